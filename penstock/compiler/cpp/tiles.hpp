// bf16 products by the matrix unit of processors that have one (AMX): sixteen rows and sixteen
// outputs at once, from the panels of products.hpp as they lie. A row's sums do not depend on how
// many rows there are, since all counts are computed here where any is.
// Source of what the instructions do: Intel 64 and IA-32 software developer's manual, volume 2, TDPBF16PS.
#pragma once
#include "vectors.hpp"

#if defined(FORMAT_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#include "matrix_unit.hpp"

constexpr int tile_rows = 16, tile_depth = 32, tile_panels = 4;
constexpr bool fits_tiles(int inputs) { return inputs % tile_depth == 0; }

// Sixteen rows (K, `width` elements apart) times `panels` neighbouring panels, into sums
// (panels, 16 rows, 16 outputs). What lies behind the last row is computed with it, and ignored.
template <int K, int panels>
inline void tile_product(const uint16_t* rows, int width, const uint16_t* weight, float* sums) {
  constexpr int panel = K * lanes, ahead_elements = 1024;
  settle_stores();
  _tile_zero(0);
  if constexpr (panels > 1) { _tile_zero(1); _tile_zero(2); _tile_zero(3); }
  for (int k = 0; k < K; k += tile_depth) {
    const uint16_t* at = weight + k * lanes;
    for (int p = 0; p < panels; p++)
      for (int line = 0; line < tile_rows; line++)
        _mm_prefetch(reinterpret_cast<const char*>(at + p * panel + ahead_elements + line * 32), _MM_HINT_T0);
    _tile_loadd(4, rows + k, width * 2);
    _tile_loadd(5, at, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (panels > 1) {
      _tile_loadd(6, at + panel, 64);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, at + 2 * panel, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, at + 3 * panel, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (panels > 1) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}
#else
constexpr int tile_rows = 1;
constexpr bool fits_tiles(int) { return false; }
inline bool request_tiles() { return false; }
inline void begin_tiles() {}
inline void end_tiles() {}
#endif
