// What the optimizer does with every parameter of a step, in one pass over memory each: plain loops,
// which compilers turn into vectors. compiler/update.py describes the arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using Half = uint16_t;  // bf16

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float widened(Half value) { return as_float(uint32_t(value) << 16); }

struct Settings {
  float keep, size, share, decay_squares, share_squares, root, epsilon, factor;
};

}  // namespace

extern "C" {

// AdamW; a master's bits are those of its weight plus its rest (training/masters.py).
__attribute__((visibility("default"))) void penstock_adamw(Half* weights, int16_t* rests, float* averages,
                                                           float* squares, const Half* gradients,
                                                           const Settings* given, int64_t count) {
  const Settings s = *given;
  constexpr int64_t piece = 1 << 14;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t end = std::min(first + piece, count);
#pragma omp simd
    for (int64_t i = first; i < end; i++) {
      const float gradient = widened(gradients[i]) * s.factor;
      const float average = averages[i] + (gradient - averages[i]) * s.share;
      const float square = s.decay_squares * squares[i] + s.share_squares * gradient * gradient;
      averages[i] = average;
      squares[i] = square;
      const float before = as_float((uint32_t(weights[i]) << 16) + uint32_t(int32_t(rests[i])));
      const float after = before * s.keep - s.size * average / (std::sqrt(square) * s.root + s.epsilon);
      const uint32_t bits = as_bits(after);
      const int16_t rest = int16_t(bits);
      rests[i] = rest;
      weights[i] = Half((bits - uint32_t(int32_t(rest))) >> 16);
    }
  }
}

// The sum of squares: of 4096 numbers in float32, of those sums in float64. The same for any number
// of threads, as each sum is taken by one and they are added in order.
__attribute__((visibility("default"))) void penstock_squares(const Half* numbers, double* sums, int64_t count) {
  constexpr int64_t piece = 1 << 12;
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t end = std::min(first + piece, count);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; i++) sum += widened(numbers[i]) * widened(numbers[i]);
    sums[first / piece] = sum;
  }
}
}
