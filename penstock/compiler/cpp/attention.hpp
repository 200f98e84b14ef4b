// Rotary positions, the key-value cache, and attention to it.
// For every text and key-value head the cache holds keys in panels of 16 positions, (capacity / 16,
// S, 16), so that one vector has a score for each of 16 positions; then values (capacity, S).
#pragma once
#include <limits>

#include "vectors.hpp"

constexpr int head_size = config::hidden / config::heads;
constexpr int group_size = config::heads / config::kv_heads;
constexpr int value_width = (head_size + lanes - 1) / lanes * lanes;
constexpr int kv_size = config::kv_heads * head_size;
constexpr int projected_size = config::hidden + 2 * kv_size;

struct Cache {
  Cached* data;
  int64_t texts, capacity;  // capacity is a multiple of 16
  int64_t head_elements() const { return capacity * (head_size + value_width); }
  Cached* keys(int64_t layer, int64_t text, int head) const {
    return data + ((layer * texts + text) * config::kv_heads + head) * head_elements();
  }
  Cached* values(int64_t layer, int64_t text, int head) const {
    return keys(layer, text, head) + capacity * head_size;
  }
};

// Turn a head (S) in place; cosines and sines are of its position, `rotary_pairs` each.
inline void rotate(float* head, const float* cosines, const float* sines) {
  for (int i = 0; i < config::rotary_pairs; i++) {
    float& a = head[config::rotary_halves ? i : 2 * i];
    float& b = head[config::rotary_halves ? i + config::rotary_pairs : 2 * i + 1];
    const float turned = a * cosines[i] - b * sines[i];
    b = b * cosines[i] + a * sines[i];
    a = turned;
  }
}

// Rotate one position's queries and keys of a key-value head, and cache its key and value.
inline void remember(float* projected, const float* turns, const Cache& cache, int64_t layer,
                     int64_t text, int64_t position, int head) {
  float* key = projected + config::hidden + head * head_size;
  if constexpr (config::rotary_pairs > 0) {
    for (int g = 0; g < group_size; g++)
      rotate(projected + (head * group_size + g) * head_size, turns, turns + config::rotary_pairs);
    rotate(key, turns, turns + config::rotary_pairs);
  }
  Cached* keys = cache.keys(layer, text, head) + position / lanes * head_size * lanes + position % lanes;
  Cached* values = cache.values(layer, text, head) + position * value_width;
  const float* value = key + kv_size;
  for (int s = 0; s < head_size; s++) {
    keys[s * lanes] = to_cached(key[s]);
    values[s] = to_cached(value[s]);
  }
}

// One query head (S) over positions 0 … last: the mixed values (S). `scores`: room for all positions.
inline void attend(const float* query, const Cached* keys, const Cached* values, int64_t last,
                   float* scores, float* mixed) {
  const float scale = 1.0f / std::sqrt(float(head_size));
  const int64_t count = last + 1;
  Vector largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t p = 0; p < count; p += lanes) {
    Vector sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    const Cached* at = keys + p * head_size;
#pragma GCC unroll 8
    for (int s = 0; s < head_size; s++)
      sums[s % 4] = _mm512_fmadd_ps(_mm512_set1_ps(query[s]), load_cached(at + s * lanes), sums[s % 4]);
    Vector score = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    score = _mm512_mul_ps(score, _mm512_set1_ps(scale));
    score = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()),
                               first(int(count - p < lanes ? count - p : lanes)), score);
    largest = _mm512_max_ps(largest, score);
    _mm512_storeu_ps(scores + p, score);
  }
  const Vector shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  Vector total = _mm512_setzero_ps();
  for (int64_t p = 0; p < count; p += lanes) {
    const __mmask16 real = first(int(count - p < lanes ? count - p : lanes));
    const Vector difference = _mm512_sub_ps(_mm512_loadu_ps(scores + p), shift);
    const Vector weight = _mm512_maskz_mov_ps(real, exponential(difference));
    total = _mm512_add_ps(total, weight);
    _mm512_storeu_ps(scores + p, weight);
  }
  const Vector share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  constexpr int vectors = value_width / lanes;
  Vector sums[vectors];
  for (int v = 0; v < vectors; v++) sums[v] = _mm512_setzero_ps();
  for (int64_t p = 0; p < count; p++) {
    const Vector weight = _mm512_set1_ps(scores[p]);
    for (int v = 0; v < vectors; v++)
      sums[v] = _mm512_fmadd_ps(weight, load_cached(values + p * value_width + v * lanes), sums[v]);
  }
  for (int v = 0; v < vectors; v++)
    _mm512_mask_storeu_ps(mixed + v * lanes, first(head_size - v * lanes), _mm512_mul_ps(sums[v], share));
}
