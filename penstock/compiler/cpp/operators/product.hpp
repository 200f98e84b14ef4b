// Products of large bf16 matrices on the matrix unit, whose factors are packed into tiles first.
//
// The larger of the two outer sides is cut into panels, each of which lies in the second cache of the
// core that takes it; the other side, packed once for all of them, passes by, 32 rows or columns of it
// in the first cache. (The blocking of GotoBLAS: Goto and van de Geijn, Anatomy of
// high-performance matrix multiplication, 2008.) While the unit computes one block of sums, the
// vector units round the one before to bf16, and what comes next is fetched from memory.
#pragma once
#include <algorithm>

#include <omp.h>

#include "memory.hpp"
#include "tiles.hpp"

#ifdef PENSTOCK_UNIT
namespace penstock {

constexpr int64_t block = 2 * lanes, block_sums = block * block;
constexpr int64_t step_halves = block * tile_depth, step_bytes = 2 * step_halves;
constexpr int64_t line_bytes = 64, step_lines = step_bytes / line_bytes;

constexpr int64_t chunk = 16;              // steps of a sum at once: 32 KiB stay in the first cache
constexpr int64_t slice = 96;              // steps of a sum for which factors are packed at once
constexpr int64_t panel_bytes = 1 << 20;   // half of the second cache
constexpr int64_t shared_bytes = 13 << 20;

// A side of a product. `pack` writes blocks of 32 × 32 elements, two tiles each: some blocks from
// `first` on, and of each, so many steps of the sum from `begin` on; one of so many parts of all that.
// Memory is read along its rows.
struct Blocks {
  int64_t first, some, begin, steps, part = 0, parts = 1;
  Half* to(Half* packed, int64_t i, int64_t k) const { return packed + (i * steps + k) * step_halves; }
};

struct LeftRows {  // (M, K)
  Matrix matrix;
  void pack(const Blocks& b, Half* packed) const {
    const int64_t rows = b.some * block;
    for (int64_t row = rows * b.part / b.parts; row < rows * (b.part + 1) / b.parts; row++) {
      const Half* from = matrix.at(b.first * block + row, b.begin * tile_depth);
      Half* to = b.to(packed, row / block, 0) + row % block * tile_depth;
      for (int64_t k = 0; k < b.steps; k++, from += tile_depth, to += step_halves)
        _mm512_store_si512(to, _mm512_loadu_si512(from));
    }
  }
};
struct RightColumns {  // (N, K)
  Matrix matrix;
  void pack(const Blocks& b, Half* packed) const {
    const int64_t rows = b.some * 2;  // of tiles
    for (int64_t row = rows * b.part / b.parts; row < rows * (b.part + 1) / b.parts; row++)
      for (int64_t k = 0; k < b.steps; k++)
        pack_across(matrix.at(b.first * block + row * lanes, (b.begin + k) * tile_depth), matrix.row,
                    b.to(packed, row / 2, k) + row % 2 * tile_halves);
  }
};

// Of these the sum runs down the rows.
template <bool turns>
struct Down {
  Matrix matrix;
  void pack(const Blocks& b, Half* packed) const {
    for (int64_t k = b.steps * b.part / b.parts; k < b.steps * (b.part + 1) / b.parts; k++)
      for (int64_t i = 0; i < b.some; i++) {
        __m512i tiles[2][16];
        load_pairs(matrix.at((b.begin + k) * tile_depth, (b.first + i) * block), matrix.row, tiles);
        for (int n = 0; n < 2; n++) {
          if constexpr (turns) turn(tiles[n]);
          store_tile(tiles[n], b.to(packed, i, k) + n * tile_halves);
        }
      }
  }
};
using LeftColumns = Down<true>;  // (K, M)
using RightRows = Down<false>;   // (K, N)

// Takes rows of 32 sums, and stores them as bf16: with a bias for each column, or without.
template <bool has_bias>
struct Store {
  Matrix result;
  const float* bias;
  // So that lines of the block are there when its rows are stored.
  void expect(int64_t i, int64_t j) const {
    for (int64_t row = 0; row < block; row++) __builtin_prefetch(result.at(i + row, j), 1);
  }
  void operator()(int64_t i, int64_t j, const float* sums) const {
    Vector low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + tile_sums);
    if constexpr (has_bias) {
      low = _mm512_add_ps(low, _mm512_load_ps(bias + j));
      high = _mm512_add_ps(high, _mm512_load_ps(bias + j + lanes));
    }
    _mm512_storeu_si512(result.at(i, j), __m512i(_mm512_cvtne2ps_pbh(high, low)));
  }
};

// A block of sums whose rows are stored a few at a time.
template <typename Finish>
class Pending {
 public:
  explicit Pending(const Finish& finish) : finish_(finish) {}
  void expect(int64_t i, int64_t j) const { finish_.expect(i, j); }
  bool has(const float* sums) const { return sums == sums_ && row_ < block; }
  void begin(int64_t i, int64_t j, const float* sums) {
    i_ = i, j_ = j, sums_ = sums, row_ = 0;
  }
  void four() {
    if (row_ == block) return;
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++, row_++)
      finish_(i_ + row_, j_, sums_ + (row_ & lanes) * 2 * lanes + (row_ & (lanes - 1)) * lanes);
  }
  void all() {
    while (row_ < block) four();
  }

 private:
  const Finish& finish_;
  const float* sums_ = nullptr;
  int64_t i_ = 0, j_ = 0, row_ = block;
};

// What is to be in the second cache soon: so many lines more at every step.
struct Ahead {
  const char *next, *end;
  int64_t lines;
  int64_t lines_of(int64_t steps) const { return next + steps * lines * line_bytes <= end ? lines : 0; }
};

// Two by two tiles of sums. The panel is read once, and is not to displace what is shared from the
// nearest cache.
template <bool panel_is_left, bool adds, typename Finish>
inline void multiply(const char* panel, const char* shared, int64_t steps, float* sums, Ahead& ahead,
                     Pending<Finish>& pending) {
  settle_stores();
  if constexpr (adds) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + tile_sums, 64);
    _tile_loadd(2, sums + 2 * tile_sums, 64);
    _tile_loadd(3, sums + 3 * tile_sums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* next = ahead.next;
  const int64_t lines = ahead.lines_of(steps);
  for (int64_t k = 0; k < steps; k++, panel += step_bytes, shared += step_bytes) {
    if constexpr (panel_is_left) {
      _tile_stream_loadd(4, panel, 64);
      _tile_stream_loadd(5, panel + step_bytes / 2, 64);
      _tile_loadd(6, shared, 64);
      _tile_loadd(7, shared + step_bytes / 2, 64);
    } else {
      _tile_loadd(4, shared, 64);
      _tile_loadd(5, shared + step_bytes / 2, 64);
      _tile_stream_loadd(6, panel, 64);
      _tile_stream_loadd(7, panel + step_bytes / 2, 64);
    }
    for (int64_t line = 0; line < lines; line++, next += line_bytes) _mm_prefetch(next, _MM_HINT_T1);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    pending.four();
  }
  ahead.next = next;
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + tile_sums, 64);
  _tile_stored(2, sums + 2 * tile_sums, 64);
  _tile_stored(3, sums + 3 * tile_sums, 64);
}

// What one thread does for a product; sizes are in blocks.
template <bool panel_is_left, typename Panel, typename Shared, typename Finish>
class ProductThread {
 public:
  // `sums`: a thread's own, of one panel or, where factors are packed in several slices, of the whole
  // result.
  ProductThread(const Panel& panel, const Shared& shared, const Finish& finish, Half* rows, Half* passing, float* sums)
      : panel_(panel), shared_(shared), pending_(finish), rows_(rows), passing_(passing), sums_(sums) {}

  // `tall` of the panels' side, cut into so many, times `wide` of the other from `offset` on. A thread
  // that other programs leave less of a core takes fewer panels.
  void run(int64_t tall, int64_t panels, int64_t offset, int64_t wide, int64_t depth) {
    const int64_t slices = rounded_up(depth, slice), me = omp_get_thread_num(), threads = omp_get_num_threads();
    offset_ = offset, wide_ = wide;
    for (int64_t number = 0; number < slices; number++) {
      begin_ = depth * number / slices;
      steps_ = depth * (number + 1) / slices - begin_;
      is_first_ = number == 0, is_last_ = number + 1 == slices;
      shared_.pack({offset, wide, begin_, steps_, me, threads}, passing_);
#pragma omp barrier
#pragma omp for schedule(dynamic)
      for (int64_t index = 0; index < panels; index++) {
        const int64_t first = tall * index / panels, some = tall * (index + 1) / panels - first;
        panel_.pack({first, some, begin_, steps_}, rows_);
        run_panel(first, some, slices == 1 ? sums_ : sums_ + first * wide * block_sums,
                  slices == 1 ? 0 : some * block_sums);
      }
    }
    pending_.all();
  }

 private:
  // `beside`: floats from the sums with one block of the other side to those with the next.
  void run_panel(int64_t first, int64_t some, float* sums, int64_t beside) {
    const int64_t pieces = rounded_up(steps_, chunk);
    for (int64_t j = 0; j < wide_; j++)
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t from = steps_ * piece / pieces, now = steps_ * (piece + 1) / pieces - from;
        const char* here = at(passing_, j * steps_ + from);
        Ahead ahead{here + now * step_bytes, at(passing_, std::min(j * steps_ + from + 2 * now, wide_ * steps_)),
                    rounded_up(step_lines, some)};
        const bool ends = is_last_ && piece + 1 == pieces;
        for (int64_t i = 0; i < some; i++) {
          const int64_t row = panel_is_left ? first + i : offset_ + j, column = panel_is_left ? offset_ + j : first + i;
          // Where blocks go down the result; along its rows, the processor fetches lines by itself.
          if (panel_is_left && ends) pending_.expect(row * block, column * block);
          float* const to = sums + j * beside + i * block_sums;
          if (pending_.has(to)) pending_.all();
          const char* own = at(rows_, i * steps_ + from);
          if (is_first_ && piece == 0)
            multiply<panel_is_left, false>(own, here, now, to, ahead, pending_);
          else
            multiply<panel_is_left, true>(own, here, now, to, ahead, pending_);
          if (ends) {
            pending_.all();
            pending_.begin(row * block, column * block, to);
          }
        }
      }
  }

  static const char* at(const Half* packed, int64_t step) {
    return reinterpret_cast<const char*>(packed + step * step_halves);
  }

  const Panel& panel_;
  const Shared& shared_;
  Pending<Finish> pending_;
  Half *rows_, *passing_;
  float* sums_;
  int64_t offset_ = 0, wide_ = 0, begin_ = 0, steps_ = 0;
  bool is_first_ = true, is_last_ = true;
};

// False: there is no memory for it.
template <bool panel_is_left, typename Panel, typename Shared, typename Finish>
bool product(const Panel& panel, const Shared& shared, int64_t tall, int64_t wide, int64_t depth, const Finish& finish) {
  const int64_t slices = rounded_up(depth, slice), steps = rounded_up(depth, slices), threads = omp_get_max_threads();
  const int64_t most = std::max<int64_t>(1, panel_bytes / (steps * step_bytes));
  const int64_t panels = std::min(tall, threads * rounded_up(tall, threads * most));
  const int64_t at_once = std::clamp<int64_t>(shared_bytes / (steps * step_bytes), 1, wide);
  const int64_t passes = rounded_up(wide, at_once), sum_bytes = 4 * block_sums;
  const int64_t packed = most * steps * step_bytes, own = packed + most * sum_bytes;
  const Memory passing = allocate(at_once * steps * step_bytes), space = allocate(threads * own);
  const Memory whole = allocate(slices == 1 ? 1 : tall * at_once * sum_bytes);
  if (!passing || !space || !whole) return false;
#pragma omp parallel
  {
    char* const rows = space.get() + omp_get_thread_num() * own;
    char* const sums = slices == 1 ? rows + packed : whole.get();
    ProductThread<panel_is_left, Panel, Shared, Finish> thread(
        panel, shared, finish, reinterpret_cast<Half*>(rows), reinterpret_cast<Half*>(passing.get()),
        reinterpret_cast<float*>(sums));
    const Tiles tiles;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t offset = wide * pass / passes;
      thread.run(tall, panels, offset, wide * (pass + 1) / passes - offset, depth);
    }
  }
  return true;
}

// result (M, N) = left (M, K) times right (K, N); all three sizes are multiples of 32.
template <typename Left, typename Right, typename Finish>
bool product(const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t depth, const Finish& finish) {
  const int64_t tall = rows / block, wide = columns / block, steps = depth / tile_depth;
  if (tall >= wide) return product<true>(left, right, tall, wide, steps, finish);
  return product<false>(right, left, wide, tall, steps, finish);
}

}  // namespace penstock
#endif
