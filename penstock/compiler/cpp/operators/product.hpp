// Products of large bf16 matrices on the matrix unit, whose factors are packed into tiles first.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include <omp.h>

#include "tiles.hpp"

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

namespace penstock {

inline int64_t rounded_up(int64_t count, int64_t of) { return (count + of - 1) / of; }

inline Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
}

struct Matrix {
  Half* data;
  int64_t rows, columns, row;  // `row`: elements from one row to the next
  Half* at(int64_t i, int64_t j) const { return data + i * row + j; }
};

constexpr int64_t block = 2 * lanes, block_halves = block * tile_depth, block_sums = block * block;
constexpr int64_t chunk = 16;           // tiles of a sum at once: the right factor's 32 KiB stay near
constexpr int64_t panel_bytes = 1 << 20;  // of the left factor, in a core's second cache

// result (M, N) = left (M, K) times right (K, N); all three sizes are multiples of 32.
// `pack_left(i, k, to)` writes the 32 × 32 block of the left factor as two tiles, `pack_right(k, j,
// to)` that of the right one. False: there is no memory for it.
template <typename PackLeft, typename PackRight>
bool product(int64_t depth, const Matrix& result, const PackLeft& pack_left, const PackRight& pack_right) {
  const int64_t steps = depth / tile_depth, wide = result.columns / block, tall = result.rows / block;
  const int64_t most = std::clamp<int64_t>(panel_bytes / (steps * block_halves * 2), 1, 8);
  const int64_t threads = omp_get_max_threads(), turns = rounded_up(tall, threads * most);
  const int64_t blocks = rounded_up(tall, threads * turns);  // as many panels for each thread
  const Memory right = allocate(depth * result.columns * 2);
  Half* const columns = reinterpret_cast<Half*>(right.get());
  const int64_t own = blocks * (steps * block_halves * 2 + block_sums * 4);
  const Memory space = allocate(own * threads);
  if (!right || !space) return false;
#pragma omp parallel
  {
    Half* const rows = reinterpret_cast<Half*>(space.get() + own * omp_get_thread_num());
    float* const sums = reinterpret_cast<float*>(rows + blocks * steps * block_halves);
    const Vector one = _mm512_set1_ps(1.0f);
    const Tiles tiles;
#pragma omp for
    for (int64_t k = 0; k < steps; k++)
      for (int64_t j = 0; j < wide; j++) pack_right(k, j, columns + (j * steps + k) * block_halves);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < tall; first += blocks) {
      const int64_t some = std::min(blocks, tall - first);
      for (int64_t k = 0; k < steps; k++)
        for (int64_t i = 0; i < some; i++) pack_left(first + i, k, rows + (i * steps + k) * block_halves);
      for (int64_t j = 0; j < wide; j++) {
        for (int64_t k = 0; k < steps; k += chunk)
          for (int64_t i = 0; i < some; i++) {
            const Factor left{rows + (i * steps + k) * block_halves, 64, 1024, 2048};
            const Factor across{columns + (j * steps + k) * block_halves, 64, 1024, 2048};
            const int64_t now = std::min(chunk, steps - k);
            if (k == 0)
              product_2x2<false, true>(left, across, now, sums + i * block_sums, 2 * tile_sums);
            else
              product_2x2<true, true>(left, across, now, sums + i * block_sums, 2 * tile_sums);
          }
        for (int64_t i = 0; i < 2 * some; i++)
          for (int64_t n = 0; n < 2; n++)
            store_rows(sums + (2 * i + n) * tile_sums, one,
                       result.at(first * block + i * lanes, j * block + n * lanes), result.row);
      }
    }
  }
  return true;
}

// result (M, N) = the transposed of left (K, M) times right (K, N).
inline bool turned_product(const Matrix& left, const Matrix& right, const Matrix& result) {
  return product(
      left.rows, result,
      [&](int64_t i, int64_t k, Half* to) {
        for (int64_t m = 0; m < 2; m++)
          pack_turned(left.at(k * tile_depth, i * block + m * lanes), left.row, to + m * tile_halves);
      },
      [&](int64_t k, int64_t j, Half* to) {
        for (int64_t n = 0; n < 2; n++)
          pack_down(right.at(k * tile_depth, j * block + n * lanes), right.row, to + n * tile_halves);
      });
}

}  // namespace penstock
