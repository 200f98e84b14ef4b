// The matrix unit of processors that have one (AMX): its tiles, and how bf16 matrices get into them.
// Other processors multiply the same tiles by vectors.
// A tile has 16 rows of 64 bytes. A product adds to a tile of float32, 16 × 16, one of 16 rows of 32
// numbers times one of 32 rows of 16, which lies in pairs: row r has the numbers 2r and 2r + 1 of
// every column side by side.
// Source: Intel 64 and IA-32 software developer's manual, volume 2, TDPBF16PS.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "memory.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include "../matrix_unit.hpp"
#define PENSTOCK_UNIT
#endif

namespace penstock {

using Vector = __m512;
constexpr int lanes = 16, tile_rows = 16, tile_depth = 32;
constexpr int tile_halves = tile_rows * tile_depth, tile_sums = tile_rows * lanes;

// A thread's use of the unit, where there is one.
class Tiles {
 public:
#ifdef PENSTOCK_UNIT
  static bool request() { return request_tiles(); }
  Tiles() { begin_tiles(); }
  ~Tiles() { end_tiles(); }
#else
  static bool request() { return true; }
  Tiles() {}
#endif
  Tiles(const Tiles&) = delete;
};

// Where the tiles of a factor lie: the first, the bytes from row to row, and from one tile to the
// next one below (of the left factor) or beside it (of the right one), and along the sum.
struct Factor {
  const void* first;
  int64_t row_bytes, next_bytes, along_bytes;
};

// Two by two tiles of sums (1 KiB each): `left` times `right` over `depth` tiles, added to what is
// there or not. The lower sums lie `down_sums` behind the upper ones.
#ifdef PENSTOCK_UNIT
template <bool adds>
inline void product_2x2(const Factor& left, const Factor& right, int64_t depth, float* sums,
                        int64_t down_sums) {
  settle_stores();
  float *upper = sums, *lower = sums + down_sums;
  if constexpr (adds) {
    _tile_loadd(0, upper, 64);
    _tile_loadd(1, upper + tile_sums, 64);
    _tile_loadd(2, lower, 64);
    _tile_loadd(3, lower + tile_sums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *a = static_cast<const char*>(left.first), *b = static_cast<const char*>(right.first);
  for (int64_t k = 0; k < depth; k++, a += left.along_bytes, b += right.along_bytes) {
    _tile_loadd(4, a, left.row_bytes);
    _tile_loadd(5, a + left.next_bytes, left.row_bytes);
    _tile_loadd(6, b, right.row_bytes);
    _tile_loadd(7, b + right.next_bytes, right.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, upper, 64);
  _tile_stored(1, upper + tile_sums, 64);
  _tile_stored(2, lower, 64);
  _tile_stored(3, lower + tile_sums, 64);
}
#else
template <bool adds>
inline void product_2x2(const Factor& left, const Factor& right, int64_t depth, float* sums,
                        int64_t down_sums) {
  constexpr int at_once = 8;  // rows, whose sums of two tiles stay in registers
  for (int first = 0; first < 2 * tile_rows; first += at_once) {
    const int64_t tile = first / tile_rows, row = first % tile_rows;
    float* to = sums + tile * down_sums + row * lanes;
    Vector sum[at_once][2];
#pragma GCC unroll 8
    for (int i = 0; i < at_once; i++)
      for (int n = 0; n < 2; n++)
        sum[i][n] = adds ? _mm512_load_ps(to + n * tile_sums + i * lanes) : _mm512_setzero_ps();
    const char* a = static_cast<const char*>(left.first) + tile * left.next_bytes + row * left.row_bytes;
    const char* b = static_cast<const char*>(right.first);
    for (int64_t k = 0; k < depth; k++, a += left.along_bytes, b += right.along_bytes)
      for (int pair = 0; pair < tile_depth / 2; pair++) {
        const __m512bh columns[2] = {
            __m512bh(_mm512_loadu_si512(b + pair * right.row_bytes)),
            __m512bh(_mm512_loadu_si512(b + right.next_bytes + pair * right.row_bytes))};
#pragma GCC unroll 8
        for (int i = 0; i < at_once; i++) {
          int both;
          __builtin_memcpy(&both, a + i * left.row_bytes + pair * 4, sizeof both);
          const __m512bh rows = __m512bh(_mm512_set1_epi32(both));
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], rows, columns[0]);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], rows, columns[1]);
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < at_once; i++)
      for (int n = 0; n < 2; n++) _mm512_store_ps(to + n * tile_sums + i * lanes, sum[i][n]);
  }
}
#endif

// Rows become columns: 16 × 16 numbers of 32 bits.
inline void turn(__m512i row[16]) {
  __m512i half[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    half[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
    half[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    row[4 * i] = _mm512_unpacklo_epi64(half[4 * i], half[4 * i + 2]);
    row[4 * i + 1] = _mm512_unpackhi_epi64(half[4 * i], half[4 * i + 2]);
    row[4 * i + 2] = _mm512_unpacklo_epi64(half[4 * i + 1], half[4 * i + 3]);
    row[4 * i + 3] = _mm512_unpackhi_epi64(half[4 * i + 1], half[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    half[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    half[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xDD);
    half[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    half[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    row[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xDD);
    row[i + 4] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xDD);
  }
}

// Sixteen numbers of two rows each, in pairs.
inline __m512i paired(__m256i upper, __m256i lower) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(upper),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(lower), 16));
}

inline __m256i load_halves(const Half* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Vector widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vector widened(const Half* from) { return widened(load_halves(from)); }

inline void store_tile(const __m512i rows[16], Half* to) {
  for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * 32, rows[i]);
}

// 32 rows of 32 numbers in pairs, by halves of their columns.
inline void load_pairs(const Half* from, int64_t row, __m512i halves[2][16]) {
  for (int i = 0; i < 16; i++, from += 2 * row) {
    const __m512i upper = _mm512_loadu_si512(from), lower = _mm512_loadu_si512(from + row);
    halves[0][i] = paired(_mm512_castsi512_si256(upper), _mm512_castsi512_si256(lower));
    halves[1][i] = paired(_mm512_extracti64x4_epi64(upper, 1), _mm512_extracti64x4_epi64(lower, 1));
  }
}

// 16 rows of 32 numbers as a right factor, summed over along the rows: the transposed, in pairs.
inline void pack_across(const Half* from, int64_t row, Half* to) {
  __m512i rows[16];
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from + i * row);
  turn(rows);
  store_tile(rows, to);
}

// 32 rows of 16 numbers as a right factor, summed over down the rows: in pairs.
inline void pack_down(const Half* from, int64_t row, Half* to) {
  for (int i = 0; i < 16; i++, from += 2 * row)
    _mm512_store_si512(to + i * 32, paired(load_halves(from), load_halves(from + row)));
}

// 32 rows of 16 numbers as a left factor, summed over down the rows: the transposed.
inline void pack_turned(const Half* from, int64_t row, Half* to) {
  __m512i rows[16];
  for (int i = 0; i < 16; i++, from += 2 * row)
    rows[i] = paired(load_halves(from), load_halves(from + row));
  turn(rows);
  store_tile(rows, to);
}

// 16 × 16 sums, times a factor for each column, as 16 columns of bf16.
inline void store_turned(const float* sums, Vector factor, Half* to, int64_t row) {
  __m512i rows[16];
  for (int i = 0; i < 16; i++)
    rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(sums + i * lanes), factor));
  turn(rows);
  for (int i = 0; i < 16; i++)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * row),
                        __m256i(_mm512_cvtneps_pbh(_mm512_castsi512_ps(rows[i]))));
}

// 16 × 16 sums times a factor, as 16 rows of bf16.
inline void store_rows(const float* sums, Vector factor, Half* to, int64_t row) {
  for (int i = 0; i < 16; i++)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + i * row),
        __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sums + i * lanes), factor))));
}

}  // namespace penstock
