// Cross entropy of rows of logits, and its gradient in their place.
#pragma once
#include <cmath>

#include "exponential.hpp"
#include "tiles.hpp"

namespace penstock {

// Sixteen of a row's logits; minus infinity behind the vocabulary's end.
inline Vector logits_at(const Half* row, int64_t first, int64_t end) {
  const int64_t there = end - first;
  const __mmask16 mask = there >= lanes ? __mmask16(0xFFFF) : __mmask16((1u << there) - 1);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, row + first);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, widened(halves));
}

struct RowLoss {
  float nll, normalizer;
};

// The row (V) becomes (softmax × (1 + 2 z_loss × normalizer) - target) × weight, zeros behind the
// vocabulary's end.
inline RowLoss cross_entropy(Half* row, int64_t width, int64_t vocabulary, int64_t target, float weight,
                             float z_loss) {
  constexpr int64_t piece = 2048;  // whose largest is found first, while it is near
  const Vector factor = _mm512_set1_ps(log2_e);
  float largest = -INFINITY, total = 0;
  const float at_target = _mm512_cvtss_f32(logits_at(row, target, target + 1));
  for (int64_t first = 0; first < vocabulary; first += piece) {
    const int64_t end = first + piece < vocabulary ? first + piece : vocabulary;
    Vector most = _mm512_set1_ps(-INFINITY);
    for (int64_t i = first; i < end; i += lanes) most = _mm512_max_ps(most, logits_at(row, i, end));
    const float before = largest;
    largest = std::fmax(largest, _mm512_reduce_max_ps(most));
    if (largest == -INFINITY) continue;
    const Vector shift = _mm512_set1_ps(largest * log2_e);
    Vector sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t i = first;
    for (; i + 2 * lanes <= end; i += 2 * lanes)
      for (int j = 0; j < 2; j++)
        sums[j] = _mm512_add_ps(sums[j], power_of_two(_mm512_fmsub_ps(logits_at(row, i + j * lanes, end), factor, shift)));
    for (; i < end; i += lanes)
      sums[0] = _mm512_add_ps(sums[0], power_of_two(_mm512_fmsub_ps(logits_at(row, i, end), factor, shift)));
    total = total * std::exp2((before - largest) * log2_e) + _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
  }
  const float normalizer = largest + std::log(total);
  const Vector shift = _mm512_set1_ps(normalizer * log2_e);
  const float scale = weight * (1 + 2 * z_loss * normalizer);
  const Vector scales = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < vocabulary; i += lanes) {
    const Vector chance = power_of_two(_mm512_fmsub_ps(logits_at(row, i, vocabulary), factor, shift));
    const __mmask16 mask = vocabulary - i >= lanes ? __mmask16(0xFFFF) : __mmask16((1u << (vocabulary - i)) - 1);
    _mm256_mask_storeu_epi16(row + i, mask, __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(chance, scales))));
  }
  const float hit = std::exp2((at_target - normalizer) * log2_e) * scale - weight;
  const __m256i rounded = _mm256_castsi128_si256(__m128i(_mm_cvtneps_pbh(_mm_set_ss(hit))));
  row[target] = Half(_mm256_extract_epi16(rounded, 0));
  for (int64_t i = vocabulary; i < width; i++) row[i] = 0;
  return {normalizer - at_target, normalizer};
}

}  // namespace penstock
