// One step of generating: new tokens of any texts through all blocks, and logits of some of them.
// Every token names its text and its position in it, so prompts of any length, single tokens and
// mixtures of both are one call without padding. Weights are read once, in the order they lie.
#include <omp.h>

#include <cstdlib>

#include "attention.hpp"
#include "products.hpp"

namespace {

struct Norm {
  const float* weight;
  const float* bias;  // null: root-mean-square norm
};

// As packed by inference/packing.py, in this order.
struct Block {
  Norm attention_norm;
  Linear query_key_value, output;
  Norm mlp_norm;
  Linear gate, up, down;
};

struct Head {
  Norm norm;
  Linear projection;
};

// Norm of a row x (D), in float32.
void normalize(const float* x, const Norm& norm, float* to) {
  constexpr int size = config::hidden;
  Vector sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int i = 0; i < size; i += lanes)
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(size - i), x + i));
  const Vector mean = _mm512_set1_ps(norm.bias ? _mm512_reduce_add_ps(sum) / size : 0.0f);
  for (int i = 0; i < size; i += lanes) {
    const __mmask16 real = first(size - i);
    const Vector centred = _mm512_maskz_sub_ps(real, _mm512_maskz_loadu_ps(real, x + i), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / size;
  const Vector scale = _mm512_set1_ps(1.0f / std::sqrt(variance + config::epsilon));
  for (int i = 0; i < size; i += lanes) {
    const __mmask16 real = first(size - i);
    Vector value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(real, x + i), mean), scale);
    value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(real, norm.weight + i));
    if (norm.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(real, norm.bias + i));
    _mm512_mask_storeu_ps(to + i, real, value);
  }
}

constexpr int panels_of(int outputs) { return (outputs + lanes - 1) / lanes; }
constexpr int padded(int size) { return round_up(size, lanes); }
constexpr bool is_parallel = config::residual != config::Residual::sequential;

// Memory of one call.
struct Workspace {
  char* memory;
  char* next;
  explicit Workspace(int64_t bytes)
      : memory(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))), next(memory) {}
  ~Workspace() { std::free(memory); }
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }
  Rows rows(int64_t count, int size) {
    const int width = round_up(size, Format::step);
    Operand* data = take<Operand>(round_up(int(count), tile_rows) * int64_t(width) + lanes);
    return {data, take<float>(count), width};
  }
};

}  // namespace

extern "C" {

// What the caller fills in; see compiler/native.py.
struct Call {
  const char* weights;      // where packed parameters lie
  const int64_t* offsets;   // of each in bytes, blocks after each other, then the head; -1: none
  void* cache;
  float* x;                 // (count, D) embedded tokens; afterwards the last block's output
  const int64_t* texts;     // (count)
  const int64_t* positions; // (count)
  const float* turns;       // (count, 2, P) cosines and sines, where positions are rotary
  const int64_t* wanted;    // (wanted_count) tokens to give logits of
  float* logits;            // (wanted_count, V)
  int64_t layers, count, wanted_count, cache_texts, capacity, threads;
};

__attribute__((visibility("default"))) int penstock_step(const Call* call) {
  constexpr int hidden = config::hidden, mlp = config::mlp;
  constexpr int block_pointers = sizeof(Block) / sizeof(void*);
  const int count = int(call->count), wanted = int(call->wanted_count);
  for (int i = 0; i < count; i++)
    if (call->texts[i] < 0 || call->texts[i] >= call->cache_texts || call->positions[i] < 0 ||
        call->positions[i] >= call->capacity)
      return 1;
  for (int i = 0; i < wanted; i++)
    if (call->wanted[i] < 0 || call->wanted[i] >= count) return 1;

  const auto resolve = [&](int64_t index) -> const void* {
    const int64_t offset = call->offsets[index];
    return offset < 0 ? nullptr : call->weights + offset;
  };
  const auto fill = [&](auto& part, int64_t from) {
    const void** pointers = reinterpret_cast<const void**>(&part);
    for (size_t i = 0; i < sizeof part / sizeof(void*); i++) pointers[i] = resolve(from + i);
  };
  const Cache cache{static_cast<Cached*>(call->cache), call->cache_texts, call->capacity};
  const int threads = int(call->threads);
  static const bool by_tiles = request_tiles();
  // A little more than the buffers below: each is rounded up to a cache line.
  const int64_t each = 4 * (padded(projected_size) + 2 * hidden + 2 * padded(mlp)) +
                       sizeof(Operand) * (4 * hidden + mlp + 8) + 256;
  const int64_t most = count + wanted + 1 + 2 * tile_rows;
  Workspace workspace(each * most + 4 * threads * (call->capacity + hidden + 64) + (1 << 14));
  float* projected = workspace.take<float>(int64_t(count) * projected_size + lanes);
  float* mixed = workspace.take<float>(int64_t(count) * hidden);
  float* gates = workspace.take<float>(config::gated ? int64_t(count) * mlp + lanes : 0);
  float* inner = workspace.take<float>(int64_t(count) * mlp + lanes);
  Rows normed = workspace.rows(count, hidden), attended = workspace.rows(count, hidden);
  Rows mlp_input = workspace.rows(count, hidden), activated = workspace.rows(count, mlp);
  Rows last = workspace.rows(wanted, hidden);
  float* thread_memory = workspace.take<float>(threads * (call->capacity + padded(hidden) + 16));

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    if (by_tiles) begin_tiles();
    float* scores = thread_memory + thread * (call->capacity + padded(hidden) + 16);
    float* row = scores + call->capacity;
    const auto share = [&](int64_t items, const auto& work) {
      const int64_t end = items * (thread + 1) / team;
      for (int64_t i = items * thread / team; i < end; i++) work(i);
    };
    const auto store = [](float* to, int width) {
      return [=](int m, int column, Vector value) {
        _mm512_mask_storeu_ps(to + int64_t(m) * width + column, first(width - column), value);
      };
    };
    const auto add_to_x = [&](int m, int column, Vector value) {
      float* to = call->x + int64_t(m) * hidden + column;
      const __mmask16 real = first(hidden - column);
      _mm512_mask_storeu_ps(to, real, _mm512_add_ps(_mm512_maskz_loadu_ps(real, to), value));
    };
    const auto norm_rows = [&](const Norm& norm, Rows& to) {
      share(count, [&](int64_t i) {
        normalize(call->x + i * hidden, norm, row);
        convert_row(row, hidden, to, int(i));
      });
    };

    for (int64_t layer = 0; layer < call->layers; layer++) {
      Block block;
      fill(block, layer * block_pointers);
      norm_rows(block.attention_norm, normed);
      if (config::residual == config::Residual::parallel) norm_rows(block.mlp_norm, mlp_input);
#pragma omp barrier
      product<hidden>(normed, count, block.query_key_value, panels_of(projected_size), thread, team, by_tiles,
                      store(projected, projected_size));
#pragma omp barrier
      share(int64_t(count) * config::kv_heads, [&](int64_t i) {
        const int64_t token = i / config::kv_heads;
        remember(projected + token * projected_size, call->turns + token * 2 * config::rotary_pairs,
                 cache, layer, call->texts[token], call->positions[token], int(i % config::kv_heads));
      });
#pragma omp barrier
      share(int64_t(count) * config::heads, [&](int64_t i) {
        const int64_t token = i / config::heads;
        const int head = int(i % config::heads), shared = head / group_size;
        const int64_t text = call->texts[token];
        attend(projected + token * projected_size + head * head_size, cache.keys(layer, text, shared),
               cache.values(layer, text, shared), call->positions[token], scores,
               mixed + token * hidden + head * head_size);
      });
#pragma omp barrier
      share(count, [&](int64_t i) { convert_row(mixed + i * hidden, hidden, attended, int(i)); });
#pragma omp barrier
      product<hidden>(attended, count, block.output, panels_of(hidden), thread, team, by_tiles, add_to_x);
#pragma omp barrier
      if (!is_parallel) {
        norm_rows(block.mlp_norm, mlp_input);
#pragma omp barrier
      }
      const Rows& input = config::residual == config::Residual::parallel_one_norm ? normed : mlp_input;
      if (config::gated)  // the same thread reads below what it writes here
        product<hidden>(input, count, block.gate, panels_of(mlp), thread, team, by_tiles, store(gates, mlp));
      product<hidden>(input, count, block.up, panels_of(mlp), thread, team, by_tiles,
                      [&](int m, int column, Vector value) {
                        const int64_t at = int64_t(m) * mlp + column;
                        const __mmask16 real = first(mlp - column);
                        value = config::gated
                                    ? _mm512_mul_ps(activate(_mm512_maskz_loadu_ps(real, gates + at)), value)
                                    : activate(value);
                        _mm512_mask_storeu_ps(inner + at, real, value);
                      });
#pragma omp barrier
      share(count, [&](int64_t i) { convert_row(inner + i * mlp, mlp, activated, int(i)); });
#pragma omp barrier
      product<mlp>(activated, count, block.down, panels_of(hidden), thread, team, by_tiles, add_to_x);
#pragma omp barrier
    }
    Head head;
    fill(head, call->layers * block_pointers);
    share(wanted, [&](int64_t i) {
      normalize(call->x + call->wanted[i] * hidden, head.norm, row);
      convert_row(row, hidden, last, int(i));
    });
#pragma omp barrier
    product<hidden>(last, wanted, head.projection, panels_of(config::vocabulary), thread, team, by_tiles,
                    store(call->logits, config::vocabulary));
    if (by_tiles) end_tiles();
  }
  return 0;
}

}  // extern "C"
