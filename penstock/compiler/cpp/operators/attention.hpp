// Softmax attention forward and backward on the matrix unit, one head at a time.
//
// Everything is computed turned: scores have a row for each key and a column for each query, so that
// a query's maximum and sum need no work across a vector, and weights come out of the registers as
// the products take them. Only the output and the logarithm of the sum are kept for the backward
// pass, which computes scores again (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
#pragma once
#include <algorithm>
#include <cmath>

#include "exponential.hpp"
#include "tiles.hpp"

namespace penstock {

struct Heads {  // (T, S) of one head: rows `row` elements apart
  Half* data;
  int64_t row;
  Half* at(int64_t position, int64_t column = 0) const { return data + position * row + column; }
};

struct Normalizers {  // (T) of one head: the logarithms of the sums, `step` elements apart
  float* data;
  int64_t step;
};

// Memory of one thread, given out in order.
class Workspace {
 public:
  explicit Workspace(char* memory) : next_(memory) {}
  template <typename Element>
  Element* take(int64_t count) {
    Element* taken = reinterpret_cast<Element*>(next_);
    next_ += (count * sizeof(Element) + 63) / 64 * 64;
    return taken;
  }

 private:
  char* next_;
};

struct Shape {
  int64_t length, size;  // T, a multiple of 32; S, another
  bool is_causal;
  float scale;
  int64_t size_tiles() const { return size / lanes; }
  int64_t depth() const { return size / tile_depth; }
  // Pairs of key tiles, 32 keys each, that queries before `end` see.
  int64_t key_pairs(int64_t end) const { return (is_causal ? end : length) / tile_depth; }
};

constexpr int pair_halves = 2 * tile_halves, pair_sums = 4 * tile_sums;

// Which of 16 queries from `query` on may see `key`.
inline __mmask16 seeing(int64_t key, int64_t query) {
  const int64_t before = std::clamp<int64_t>(key - query, 0, lanes);
  return __mmask16(0xFFFFu << before);
}

// Two rows of weights, of 16 queries each, as a row of pairs.
inline __m512i paired(Vector upper, Vector lower) {
  return paired(__m256i(_mm512_cvtneps_pbh(upper)), __m256i(_mm512_cvtneps_pbh(lower)));
}

class ForwardHead {
 public:
  static int64_t bytes(const Shape& s) {
    return 2 * (s.length * s.size + 32 * s.size + 32 * s.length) + 4 * (32 * s.length + 4 * tile_sums) + 1024;
  }
  ForwardHead(const Shape& shape, Workspace& space) : s_(shape) {
    values_ = space.take<Half>(s_.length * s_.size);
    queries_ = space.take<Half>(32 * s_.size);
    weights_ = space.take<Half>(32 * s_.length);
    scores_ = space.take<float>(32 * s_.length);
    sums_ = space.take<float>(4 * tile_sums);
  }

  void run(const Heads& query, const Heads& key, const Heads& value, const Heads& output,
           const Normalizers& normalizers) {
    for (int64_t pair = 0; pair < s_.length / tile_depth; pair++)
      for (int64_t d = 0; d < s_.size_tiles(); d++)
        pack_turned(value.at(pair * tile_depth, d * lanes), value.row,
                    values_ + (pair * s_.size_tiles() + d) * tile_halves);
    for (int64_t first = 0; first < s_.length; first += 32) {
      for (int64_t n = 0; n < 2; n++)
        for (int64_t k = 0; k < s_.depth(); k++)
          pack_across(query.at(first + n * lanes, k * tile_depth), query.row,
                      queries_ + (n * s_.depth() + k) * tile_halves);
      const int64_t pairs = s_.key_pairs(first + 32);
      Vector inverse[2];
      score(key, first, pairs);
      weigh(first, pairs, normalizers, inverse);
      mix(output, first, pairs, inverse);
    }
  }

 private:
  void score(const Heads& key, int64_t first, int64_t pairs) {
    largest_[0] = largest_[1] = _mm512_set1_ps(-INFINITY);
    for (int64_t pair = 0; pair < pairs; pair++) {
      const Factor left{key.at(pair * tile_depth), key.row * 2, lanes * key.row * 2, 64};
      const Factor right{queries_, 64, s_.depth() * 1024, 1024};
      float* to = scores_ + pair * pair_sums;
      product_2x2<false>(left, right, s_.depth(), to, 2 * tile_sums);
      const bool is_cut = s_.is_causal && (pair + 1) * tile_depth > first;
      for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++)
          for (int i = 0; i < lanes; i++) {
            const Vector x = _mm512_load_ps(to + (2 * m + n) * tile_sums + i * lanes);
            const __mmask16 seen =
                is_cut ? seeing(pair * tile_depth + m * lanes + i, first + n * lanes) : __mmask16(0xFFFF);
            largest_[n] = _mm512_mask_max_ps(largest_[n], seen, largest_[n], x);
          }
    }
  }

  void weigh(int64_t first, int64_t pairs, const Normalizers& normalizers, Vector inverse[2]) {
    const Vector factor = _mm512_set1_ps(s_.scale * log2_e);
    for (int n = 0; n < 2; n++) {
      const Vector shift = _mm512_mul_ps(largest_[n], factor);
      Vector total = _mm512_setzero_ps();
      for (int64_t pair = 0; pair < pairs; pair++) {
        const bool is_cut = s_.is_causal && (pair + 1) * tile_depth > first;
        Half* to = weights_ + (2 * pair + n) * tile_halves;
        for (int m = 0; m < 2; m++)
          for (int i = 0; i < lanes; i += 2) {
            const float* from = scores_ + pair * pair_sums + (2 * m + n) * tile_sums + i * lanes;
            Vector x[2];
            for (int j = 0; j < 2; j++) {
              x[j] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(from + j * lanes), factor, shift));
              if (is_cut)
                x[j] = _mm512_maskz_mov_ps(seeing(pair * tile_depth + m * lanes + i + j, first + n * lanes), x[j]);
              total = _mm512_add_ps(total, x[j]);
            }
            _mm512_store_si512(to + (m * 8 + i / 2) * tile_depth, paired(x[0], x[1]));
          }
      }
      inverse[n] = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
      alignas(64) float sums[lanes], shifts[lanes];
      _mm512_store_ps(sums, total);
      _mm512_store_ps(shifts, shift);
      for (int i = 0; i < lanes; i++)
        normalizers.data[(first + n * lanes + i) * normalizers.step] = shifts[i] * ln_2 + std::log(sums[i]);
    }
  }

  void mix(const Heads& output, int64_t first, int64_t pairs, const Vector inverse[2]) {
    for (int64_t d = 0; d < s_.size_tiles(); d += 2) {
      const Factor left{values_ + d * tile_halves, 64, 1024, s_.size_tiles() * 1024};
      const Factor right{weights_, 64, 1024, 2048};
      product_2x2<false>(left, right, pairs, sums_, 2 * tile_sums);
      for (int m = 0; m < 2; m++)
        for (int n = 0; n < 2; n++)
          store_turned(sums_ + (2 * m + n) * tile_sums, inverse[n],
                       output.at(first + n * lanes, (d + m) * lanes), output.row);
    }
  }

  Shape s_;
  Half *values_, *queries_, *weights_;
  float *scores_, *sums_;
  Vector largest_[2];
};

class BackwardHead {
 public:
  static constexpr int64_t queries_at_once = 128;
  static int64_t bytes(const Shape& s) {
    return 2 * (s.length * s.size + 4 * queries_at_once * s.size + 2 * 32 * queries_at_once + s.length * queries_at_once) +
           4 * (2 * s.length * s.size + 2 * s.length + 2 * pair_sums + pair_sums) + 4096;
  }
  BackwardHead(const Shape& shape, Workspace& space) : s_(shape) {
    keys_ = space.take<Half>(s_.length * s_.size);
    for (Half** packed : {&queries_across_, &gradients_across_, &queries_down_, &gradients_down_})
      *packed = space.take<Half>(queries_at_once * s_.size);
    weights_ = space.take<Half>(32 * queries_at_once);
    inner_ = space.take<Half>(32 * queries_at_once);
    inner_pairs_ = space.take<Half>(s_.length * queries_at_once);
    for_keys_ = space.take<float>(s_.length * s_.size);
    for_values_ = space.take<float>(s_.length * s_.size);
    corrections_ = space.take<float>(s_.length);
    normalizers_ = space.take<float>(s_.length);
    scores_ = space.take<float>(pair_sums);
    upstream_ = space.take<float>(pair_sums);
    sums_ = space.take<float>(pair_sums);
  }

  struct Given { Heads query, key, value, output, gradient; Normalizers normalizers; };
  struct Wanted { Heads query, key, value; };

  void run(const Given& given, const Wanted& wanted) {
    correct(given);
    for (int64_t pair = 0; pair < s_.length / tile_depth; pair++)
      for (int64_t d = 0; d < s_.size_tiles(); d++)
        pack_turned(given.key.at(pair * tile_depth, d * lanes), given.key.row,
                    keys_ + (pair * s_.size_tiles() + d) * tile_halves);
    for (int64_t first = 0; first < s_.length; first += queries_at_once) {
      const int64_t end = std::min(first + queries_at_once, s_.length);
      pack(given, first, end);
      const int64_t pairs = s_.key_pairs(end);
      for (int64_t pair = 0; pair < pairs; pair++) {
        // Queries before these keys see none of them.
        const int64_t start = s_.is_causal ? std::max(first, pair * tile_depth) : first;
        for (int64_t at = start; at < end; at += 32) weigh(given, pair, first, at);
        const bool is_first = first == 0 || (s_.is_causal && pair * tile_depth >= first);
        add(weights_, gradients_down_, for_values_, pair, (start - first) / 32, (end - first) / 32, is_first);
        add(inner_, queries_down_, for_keys_, pair, (start - first) / 32, (end - first) / 32, is_first);
      }
      for (int64_t at = first; at < end; at += 32) finish_queries(wanted.query, first, at);
    }
    finish(for_keys_, s_.scale, wanted.key);
    finish(for_values_, 1.0f, wanted.value);
  }

 private:
  // Of each query, the sum of its output times its gradient; normalizers as powers of two.
  void correct(const Given& given) {
    for (int64_t t = 0; t < s_.length; t++) {
      normalizers_[t] = given.normalizers.data[t * given.normalizers.step] * log2_e;
      Vector sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < s_.size; d += lanes)
        sum = _mm512_fmadd_ps(widened(given.output.at(t, d)), widened(given.gradient.at(t, d)), sum);
      corrections_[t] = _mm512_reduce_add_ps(sum);
    }
  }

  void pack(const Given& given, int64_t first, int64_t end) {
    for (int64_t n = 0; n < (end - first) / lanes; n++)
      for (int64_t k = 0; k < s_.depth(); k++) {
        const int64_t to = (n * s_.depth() + k) * tile_halves;
        pack_across(given.query.at(first + n * lanes, k * tile_depth), given.query.row, queries_across_ + to);
        pack_across(given.gradient.at(first + n * lanes, k * tile_depth), given.gradient.row, gradients_across_ + to);
      }
    for (int64_t k = 0; k < (end - first) / tile_depth; k++)
      for (int64_t d = 0; d < s_.size_tiles(); d++) {
        const int64_t to = (k * s_.size_tiles() + d) * tile_halves;
        pack_down(given.query.at(first + k * tile_depth, d * lanes), given.query.row, queries_down_ + to);
        pack_down(given.gradient.at(first + k * tile_depth, d * lanes), given.gradient.row, gradients_down_ + to);
      }
  }

  // Weights and the scores' gradients of 32 keys and 32 queries: as left factors, and the latter in
  // pairs of keys as a right one.
  void weigh(const Given& given, int64_t pair, int64_t first, int64_t at_query) {
    const int64_t n = (at_query - first) / lanes, k = n / 2;
    const Half* across[2] = {queries_across_, gradients_across_};
    const Heads* rows[2] = {&given.key, &given.value};
    float* results[2] = {scores_, upstream_};
    for (int i = 0; i < 2; i++) {
      const Factor left{rows[i]->at(pair * tile_depth), rows[i]->row * 2, lanes * rows[i]->row * 2, 64};
      const Factor right{across[i] + n * s_.depth() * tile_halves, 64, s_.depth() * 1024, 1024};
      product_2x2<false>(left, right, s_.depth(), results[i], 2 * tile_sums);
    }
    const Vector factor = _mm512_set1_ps(s_.scale * log2_e);
    Vector normalizer[2], correction[2];
    for (int j = 0; j < 2; j++) {
      normalizer[j] = _mm512_load_ps(normalizers_ + at_query + j * lanes);
      correction[j] = _mm512_load_ps(corrections_ + at_query + j * lanes);
    }
    const bool is_cut = s_.is_causal && (pair + 1) * tile_depth > at_query;
    Half* weights = weights_ + k * pair_halves;
    Half* inner = inner_ + k * pair_halves;
    Half* pairs = inner_pairs_ + (pair * (queries_at_once / lanes) + n) * tile_halves;
    for (int m = 0; m < 2; m++)
      for (int i = 0; i < lanes; i += 2) {
        __m512i both[2];
        for (int r = 0; r < 2; r++) {
          Vector weight[2], change[2];
          for (int j = 0; j < 2; j++) {
            const int64_t place = (2 * m + j) * tile_sums + (i + r) * lanes;
            weight[j] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores_ + place), factor, normalizer[j]));
            if (is_cut)
              weight[j] = _mm512_maskz_mov_ps(
                  seeing(pair * tile_depth + m * lanes + i + r, at_query + j * lanes), weight[j]);
            change[j] = _mm512_mul_ps(weight[j], _mm512_sub_ps(_mm512_load_ps(upstream_ + place), correction[j]));
          }
          const int64_t row = (m * lanes + i + r) * tile_depth;
          _mm512_store_si512(weights + row, __m512i(_mm512_cvtne2ps_pbh(weight[1], weight[0])));
          both[r] = __m512i(_mm512_cvtne2ps_pbh(change[1], change[0]));
          _mm512_store_si512(inner + row, both[r]);
        }
        const int64_t row = (m * 8 + i / 2) * tile_depth;
        _mm512_store_si512(pairs + row, paired(_mm512_castsi512_si256(both[0]), _mm512_castsi512_si256(both[1])));
        _mm512_store_si512(pairs + tile_halves + row,
                           paired(_mm512_extracti64x4_epi64(both[0], 1), _mm512_extracti64x4_epi64(both[1], 1)));
      }
  }

  // What queries `begin` to `end`, of 32 each, add to 32 rows of gradients.
  void add(const Half* left, const Half* right, float* sums, int64_t pair, int64_t begin, int64_t end, bool is_first) {
    const Factor rows{left + begin * pair_halves, 64, 1024, 2048};
    for (int64_t d = 0; d < s_.size_tiles(); d += 2) {
      const Factor columns{right + (begin * s_.size_tiles() + d) * tile_halves, 64, 1024, s_.size_tiles() * 1024};
      float* to = sums + (pair * 2 * s_.size_tiles() + d) * tile_sums;
      const int64_t down = s_.size_tiles() * tile_sums;
      if (is_first)
        product_2x2<false>(rows, columns, end - begin, to, down);
      else
        product_2x2<true>(rows, columns, end - begin, to, down);
    }
  }

  void finish_queries(const Heads& wanted, int64_t first, int64_t at_query) {
    const int64_t n = (at_query - first) / lanes, pairs = s_.key_pairs(at_query + 32);
    const Vector factor = _mm512_set1_ps(s_.scale);
    for (int64_t d = 0; d < s_.size_tiles(); d += 2) {
      const Factor left{keys_ + d * tile_halves, 64, 1024, s_.size_tiles() * 1024};
      const Factor right{inner_pairs_ + n * tile_halves, 64, 1024, (queries_at_once / lanes) * 1024};
      product_2x2<false>(left, right, pairs, sums_, 2 * tile_sums);
      for (int m = 0; m < 2; m++)
        for (int j = 0; j < 2; j++)
          store_turned(sums_ + (2 * m + j) * tile_sums, factor,
                       wanted.at(at_query + j * lanes, (d + m) * lanes), wanted.row);
    }
  }

  void finish(const float* sums, float scale, const Heads& wanted) {
    const Vector factor = _mm512_set1_ps(scale);
    for (int64_t t = 0; t < s_.length / lanes; t++)
      for (int64_t d = 0; d < s_.size_tiles(); d++)
        store_rows(sums + (t * s_.size_tiles() + d) * tile_sums, factor, wanted.at(t * lanes, d * lanes), wanted.row);
  }

  Shape s_;
  Half *keys_, *queries_across_, *gradients_across_, *queries_down_, *gradients_down_;
  Half *weights_, *inner_, *inner_pairs_;
  float *for_keys_, *for_values_, *corrections_, *normalizers_, *scores_, *upstream_, *sums_;
};

}  // namespace penstock
