// Sixteen floats at a time: loading and storing the cache's format, activations, reductions.
// A generated prologue defines the constants of `config` before this file (compiler/native.py).
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>

using Vector = __m512;
constexpr int lanes = 16;

// The cache is in the format the model computes in; all sums are in float32.
#ifdef CACHE_FP32
using Cached = float;
inline Vector load_cached(const Cached* from) { return _mm512_loadu_ps(from); }
inline Cached to_cached(float value) { return value; }
#else
using Cached = uint16_t;
inline Vector load_cached(const Cached* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Cached to_cached(float value) {
  const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));  // to nearest, ties to even
  Cached bits;
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
#endif

inline __mmask16 first(int count) {
  return count >= lanes ? __mmask16(0xFFFF) : __mmask16((1u << (count > 0 ? count : 0)) - 1);
}

// 2^(x log2 e): the fraction by a polynomial of degree 6 (error below 2e-7 of the result).
inline Vector exponential(Vector x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-104.0f));
  const Vector scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const Vector whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT);
  Vector rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
  Vector sum = _mm512_set1_ps(1.0f / 720);
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

// 1 / (1 + e^-x)
inline Vector sigmoid(Vector x) {
  const Vector one = _mm512_set1_ps(1.0f);
  const Vector negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(negative)));
}

// The Gaussian's distribution function (Abramowitz & Stegun 7.1.26, error below 1.5e-7).
inline Vector normal_distribution(Vector x) {
  const Vector one = _mm512_set1_ps(1.0f), scaled = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
  const Vector size = _mm512_abs_ps(scaled);
  const Vector t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  Vector sum = _mm512_set1_ps(1.061405429f);
  for (float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
    sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(factor));
  const Vector square = _mm512_mul_ps(scaled, scaled);
  const Vector tail = _mm512_mul_ps(sum, exponential(_mm512_sub_ps(_mm512_setzero_ps(), square)));
  const Vector half = _mm512_mul_ps(tail, _mm512_set1_ps(0.5f));  // beyond |x|
  const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(half, __mmask16(~below), one, half);
}

inline Vector activate(Vector x) {
  if constexpr (config::activation == config::Activation::relu)
    return _mm512_max_ps(x, _mm512_setzero_ps());
  if constexpr (config::activation == config::Activation::silu)
    return _mm512_mul_ps(x, sigmoid(x));
  if constexpr (config::activation == config::Activation::gelu)
    return _mm512_mul_ps(x, normal_distribution(x));
  // GELU by tanh: x/2 (1 + tanh u) is x sigmoid(2u).
  const Vector cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const Vector inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, _mm512_set1_ps(1.59576912f))));
}
