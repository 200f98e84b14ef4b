// Powers of two, sixteen at a time, by AVX-512.
#pragma once
#include <immintrin.h>

namespace penstock {

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// 2^x to 1e-7 of itself, 0 for what is too small: the whole part into the exponent, the fraction
// by a polynomial of degree 5, whose factors were fitted for the least relative error on [0, 1). What
// is not a number stays none: of two operands, a maximum with one of these gives the second.
inline __m512 power_of_two(__m512 x) {
  constexpr int by_floor = 1;
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 fraction = _mm512_reduce_ps(x, by_floor);
  __m512 sum = _mm512_set1_ps(0.0018775759963318706f);
  sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(0.00898934155702591f));
  sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(0.05582631751894951f));
  sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(0.24015361070632935f));
  sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(0.6931530833244324f));
  sum = _mm512_fmadd_ps(sum, fraction, _mm512_set1_ps(0.9999999403953552f));
  return _mm512_scalef_ps(sum, x);
}

}  // namespace penstock
