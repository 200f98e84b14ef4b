// Products of a few rows with a packed weight matrix, limited by reading the weights once.
// Weights (N, K) are stored as panels of 16 outputs; within a panel, for each step of K, the 16
// outputs' elements of that step: two neighbours for bf16 and int8, one for float32. A step is
// then one instruction per row, with the row's elements broadcast. Missing outputs are zeros.
#pragma once
#include <utility>

#include "tiles.hpp"
#include "vectors.hpp"

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

#if defined(FORMAT_FP32)
struct Format {
  using Weight = float;
  using Operand = float;
  using Sum = __m512;
  using Loaded = __m512;
  static constexpr int step = 1, group = 1 << 30;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Loaded load(const Weight* from) { return _mm512_loadu_ps(from); }
  static Sum add(Sum sum, Loaded weights, const Operand* row) {
    return _mm512_fmadd_ps(weights, _mm512_set1_ps(*row), sum);
  }
  static Vector result(Sum sum) { return sum; }
};
#elif defined(FORMAT_BF16)
struct Format {
  using Weight = uint16_t;
  using Operand = uint16_t;
  using Sum = __m512;
  using Loaded = __m512i;
  static constexpr int step = 2, group = 1 << 30;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Loaded load(const Weight* from) { return _mm512_loadu_si512(from); }
  static Sum add(Sum sum, Loaded weights, const Operand* row) {
    int pair;
    __builtin_memcpy(&pair, row, sizeof pair);
    return _mm512_dpbf16_ps(sum, __m512bh(weights), __m512bh(_mm512_set1_epi32(pair)));
  }
  static Vector result(Sum sum) { return sum; }
};
#else  // int8 weights with a scale for every output and group; rows in 16 bits with a scale each
struct Format {
  using Weight = int8_t;
  using Operand = int16_t;
  using Sum = __m512i;
  using Loaded = __m512i;
  // 127 × 32767 × 128 fits 32 bits four times over: no sum of a group overflows.
  static constexpr int step = 2, group = 128;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Loaded load(const Weight* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Sum add(Sum sum, Loaded weights, const Operand* row) {
    int pair;
    __builtin_memcpy(&pair, row, sizeof pair);
    return _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32(pair));
  }
  static Vector result(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};
#endif
constexpr bool has_scales = Format::group < (1 << 30);
using Operand = Format::Operand;

struct Linear {
  const Format::Weight* weight;
  const float* scale;  // (panels, groups, 16), int8 only
  const float* bias;   // (panels × 16) or null
};

// Rows as products take them: `width` elements each, zeros behind the last one.
struct Rows {
  Operand* data;
  float* scale;  // of each row, int8 only
  int width;
  const Operand* at(int row) const { return data + int64_t(row) * width; }
};

// One float32 row (size) in the format products take.
inline void convert_row(const float* from, int size, Rows& rows, int row) {
  Operand* to = rows.data + int64_t(row) * rows.width;
  Vector largest = _mm512_setzero_ps();
  if constexpr (has_scales) {
    for (int i = 0; i < size; i += lanes) {
      const Vector x = _mm512_maskz_loadu_ps(first(size - i), from + i);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    }
    rows.scale[row] = _mm512_reduce_max_ps(largest) / 32767.0f;
  }
  const float scale = has_scales ? rows.scale[row] : 1.0f;
  const Vector factor = _mm512_set1_ps(scale > 1e-30f ? 1.0f / scale : 0.0f);
  for (int i = 0; i < rows.width; i += lanes) {
    const Vector x = _mm512_maskz_loadu_ps(first(size - i), from + i);
    const __mmask16 kept = first(rows.width - i);
#if defined(FORMAT_FP32)
    _mm512_mask_storeu_ps(to + i, kept, x);
    (void)factor;
#elif defined(FORMAT_BF16)
    _mm256_mask_storeu_epi16(to + i, kept, __m256i(_mm512_cvtneps_pbh(x)));
    (void)factor;
#else
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, factor));
    _mm256_mask_storeu_epi16(to + i, kept, _mm512_cvtsepi32_epi16(whole));
#endif
  }
}

constexpr int most_rows = 14;
constexpr int most_panels = 4;
constexpr int ahead = 2048;  // bytes to prefetch in every panel: of 512 to 4096, the fastest on Zen 4

// M rows times `panels` neighbouring panels, into sums (M, panels × 16).
template <int M, int panels, int K>
inline void tile(const Operand* rows, int width, const Format::Weight* weight, const float* scale,
                 float* sums) {
  constexpr int steps = round_up(K, Format::step) / Format::step;
  constexpr int panel = steps * Format::step * lanes;
  constexpr int group = Format::group >= K ? steps : Format::group / Format::step;
  constexpr int groups = (steps + group - 1) / group;
  for (int g = 0; g < groups; g++) {
    Format::Sum sum[M][panels];
    for (int m = 0; m < M; m++)
      for (int p = 0; p < panels; p++) sum[m][p] = Format::zero();
    const int end = g + 1 < groups ? (g + 1) * group : steps;
    for (int s = g * group; s < end; s++) {
      const Format::Weight* at = weight + s * Format::step * lanes;
      Format::Loaded loaded[panels];
#pragma GCC unroll 4
      for (int p = 0; p < panels; p++) {
        loaded[p] = Format::load(at + p * panel);
        _mm_prefetch(reinterpret_cast<const char*>(at + p * panel) + ahead, _MM_HINT_T0);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++)
          sum[m][p] = Format::add(sum[m][p], loaded[p], rows + m * width + s * Format::step);
    }
    for (int m = 0; m < M; m++)
      for (int p = 0; p < panels; p++) {
        Vector value = Format::result(sum[m][p]);
        float* to = sums + (m * panels + p) * lanes;
        if constexpr (has_scales) {
          const Vector factor = _mm512_loadu_ps(scale + (p * groups + g) * lanes);
          value = g == 0 ? _mm512_mul_ps(value, factor)
                         : _mm512_fmadd_ps(value, factor, _mm512_load_ps(to));
        }
        _mm512_store_ps(to, value);
      }
  }
}

// Panels at once that M rows leave registers for; int8 sums are also held while they are scaled.
constexpr int panels_for(int rows) {
  if (rows <= 4) return 4;
  if (has_scales) return rows <= 6 ? 2 : 1;
  return rows <= 8 ? 3 : 2;
}

using Tile = void (*)(const Operand*, int, const Format::Weight*, const float*, float*);
template <int K, int... M>
constexpr auto tiles_of(std::integer_sequence<int, M...>) {
  struct Table { Tile wide[most_rows], narrow[most_rows]; };
  return Table{{tile<M + 1, panels_for(M + 1), K>...}, {tile<M + 1, 1, K>...}};
}

// Panels `begin` to `end`, by the processor's matrix unit.
template <int K, typename Finish>
void product_by_tiles(const Rows& rows, int count, const Linear& linear, int begin, int end,
                      const Finish& finish) {
#if defined(FORMAT_BF16) && defined(__AMX_BF16__)
  alignas(64) float sums[tile_panels * tile_rows * lanes];
  for (int p = begin, now; p < end; p += now) {
    now = end - p >= tile_panels ? tile_panels : 1;
    const uint16_t* weight = linear.weight + int64_t(p) * K * lanes;
    for (int row = 0; row < count; row += tile_rows) {
      if (now > 1)
        tile_product<K, tile_panels>(rows.at(row), rows.width, weight, sums);
      else
        tile_product<K, 1>(rows.at(row), rows.width, weight, sums);
      const int some = count - row < tile_rows ? count - row : tile_rows;
      for (int m = 0; m < some; m++)
        for (int i = 0; i < now; i++) {
          const int column = (p + i) * lanes;
          Vector value = _mm512_load_ps(sums + (i * tile_rows + m) * lanes);
          if (linear.bias) value = _mm512_add_ps(value, _mm512_loadu_ps(linear.bias + column));
          finish(row + m, column, value);
        }
    }
  }
#endif
}

// For this thread's share of the panels: count rows (K) × the panel, + bias, to
// `finish(row, column, sixteen results)`. `by_tiles`: whether `begin_tiles` was called.
template <int K, typename Finish>
void product(const Rows& rows, int count, const Linear& linear, int panels, int thread, int threads,
             bool by_tiles, const Finish& finish) {
  static constexpr auto tiles = tiles_of<K>(std::make_integer_sequence<int, most_rows>());
  constexpr int64_t panel = int64_t(round_up(K, Format::step)) * lanes;
  constexpr int groups = has_scales ? (K + Format::group - 1) / Format::group : 0;
  alignas(64) float sums[most_rows * most_panels * lanes];
  const int begin = int64_t(panels) * thread / threads, end = int64_t(panels) * (thread + 1) / threads;
  if constexpr (fits_tiles(K))
    if (by_tiles) return product_by_tiles<K>(rows, count, linear, begin, end, finish);
  // Rows in tiles of about one size; weights in the outer loop, so that all tiles but the first
  // find them in the cache.
  const int tiles_needed = (count + most_rows - 1) / most_rows;
  const int tallest = tiles_needed ? (count + tiles_needed - 1) / tiles_needed : 1;
  const int wide = panels_for(tallest);
  for (int p = begin; p < end;) {
    const int now = end - p >= wide ? wide : 1;
    for (int row = 0; row < count; row += tallest) {
      const int some = count - row < tallest ? count - row : tallest;
      int done = 0;
      while (done < now) {  // the last rows may take more panels at once than there are now
        const int part = now - done >= panels_for(some) ? panels_for(some) : 1;
        const Tile run = part > 1 ? tiles.wide[some - 1] : tiles.narrow[some - 1];
        const int64_t at = p + done;
        run(rows.at(row), rows.width, linear.weight + at * panel,
            has_scales ? linear.scale + at * groups * lanes : nullptr, sums);
        for (int m = 0; m < some; m++)
          for (int i = 0; i < part; i++) {
            const int column = (at + i) * lanes;
            Vector value = _mm512_load_ps(sums + (m * part + i) * lanes);
            if constexpr (has_scales)
              value = _mm512_mul_ps(value, _mm512_set1_ps(rows.scale[row + m]));
            if (linear.bias) value = _mm512_add_ps(value, _mm512_loadu_ps(linear.bias + column));
            finish(row + m, column, value);
          }
        done += part;
      }
    }
    p += now;
  }
}
