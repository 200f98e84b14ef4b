// Matrices in memory that others own, and memory of our own.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace penstock {

using Half = uint16_t;  // bf16

inline int64_t rounded_up(int64_t count, int64_t of) { return (count + of - 1) / of; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, rounded_up(bytes, 64) * 64)));
}

struct Matrix {
  Half* data;
  int64_t rows, columns, row;  // `row`: elements from one row to the next
  Half* at(int64_t i, int64_t j) const { return data + i * row + j; }
};

}  // namespace penstock
