// Our own operators, as Inductor's code calls them (compiler/operators.py): handles of tensors in,
// handles of new tensors out, 0 for success. Shapes were checked when the graph was made.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>

#include "attention.hpp"
#include "cross_entropy.hpp"
#include "product.hpp"

using namespace penstock;

namespace {

constexpr AOTITorchError success = AOTI_TORCH_SUCCESS, failure = AOTI_TORCH_FAILURE;

struct Tensor {
  explicit Tensor(AtenTensorHandle handle) {
    is_there = aoti_torch_get_sizes(handle, &sizes) == success &&
               aoti_torch_get_strides(handle, &strides) == success &&
               aoti_torch_get_data_ptr(handle, &data) == success;
  }
  bool is_there;
  int64_t *sizes, *strides;
  void* data;
  Half* halves() const { return static_cast<Half*>(data); }
  float* floats() const { return static_cast<float*>(data); }
  // (T, S) of head number `index` of (B, H, T, S).
  Heads head(int64_t index) const {
    const int64_t batch = index / sizes[1], head = index % sizes[1];
    return {halves() + batch * strides[0] + head * strides[1], strides[2]};
  }
  // (T) of head number `index` of (B, H, T).
  Normalizers normalizers(int64_t index) const {
    return {floats() + index / sizes[1] * strides[0] + index % sizes[1] * strides[1], strides[2]};
  }
  Matrix matrix() const { return {halves(), sizes[0], sizes[1], strides[0]}; }
  Matrix turned_matrix() const { return {halves(), sizes[1], sizes[0], strides[1]}; }
  bool is_turned() const { return strides[1] != 1; }
};

bool are_there(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors)
    if (!tensor->is_there) return false;
  if (Tiles::request()) return true;
  std::fputs("the system does not give this process the processor's matrix unit (AMX)\n", stderr);
  return false;
}

bool make(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, int32_t dtype,
          AtenTensorHandle* made) {
  return aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype,
                                  aoti_torch_device_type_cpu(), 0, made) == success;
}

// (B, H, T, S) as it lies before its heads are put side by side: (B, T, H, S).
bool make_heads(const Tensor& like, AtenTensorHandle* made) {
  const int64_t *size = like.sizes, row = size[1] * size[3];
  return make({size[0], size[1], size[2], size[3]}, {size[2] * row, size[3], row, 1},
              aoti_torch_dtype_bfloat16(), made);
}

Shape shape_of(const Tensor& query, int32_t is_causal, double scale) {
  return {query.sizes[2], query.sizes[3], is_causal != 0, float(scale)};
}

// `run(state, head)` for every head, on all threads, each with a State of its own.
template <typename State, typename Run>
AOTITorchError for_each_head(const Tensor& query, const Shape& shape, const Run& run) {
  const int64_t heads = query.sizes[0] * query.sizes[1];
  const int64_t own = rounded_up(State::bytes(shape), 64) * 64;
  const Memory memory = allocate(own * omp_get_max_threads());
  if (!memory) return failure;
#pragma omp parallel
  {
    Workspace space(memory.get() + own * omp_get_thread_num());
    State state(shape, space);
    const Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < heads; head++) run(state, head);
  }
  return success;
}

#ifdef PENSTOCK_UNIT
// `use` with the factors as they lie in memory: by rows, or by columns (turned).
template <typename Use>
bool with_factors(const Tensor& left, const Tensor& right, const Use& use) {
  const Matrix turned_left = left.turned_matrix(), turned_right = right.turned_matrix();
  if (left.is_turned())
    return right.is_turned() ? use(LeftColumns{turned_left}, RightColumns{turned_right})
                             : use(LeftColumns{turned_left}, RightRows{right.matrix()});
  return right.is_turned() ? use(LeftRows{left.matrix()}, RightColumns{turned_right})
                           : use(LeftRows{left.matrix()}, RightRows{right.matrix()});
}

AOTITorchError product_of(AtenTensorHandle left_, AtenTensorHandle right_, AtenTensorHandle bias_,
                          AtenTensorHandle* result_) {
  const Tensor left(left_), right(right_);
  if (!are_there({&left, &right})) return failure;
  const int64_t rows = left.sizes[0], depth = left.sizes[1], columns = right.sizes[1];
  if (!make({rows, columns}, {columns, 1}, aoti_torch_dtype_bfloat16(), result_)) return failure;
  const Matrix result = Tensor(*result_).matrix();
  const auto multiply_and = [&](const auto& finish) {
    return with_factors(left, right, [&](const auto& one, const auto& other) {
      return product(one, other, rows, columns, depth, finish);
    });
  };
  if (bias_ == nullptr) return multiply_and(Store<false>{result, nullptr}) ? success : failure;
  const Tensor bias(bias_);
  const Memory wide = allocate(columns * sizeof(float));
  if (!bias.is_there || !wide) return failure;
  float* const floats = reinterpret_cast<float*>(wide.get());
  for (int64_t j = 0; j < columns; j += lanes) _mm512_store_ps(floats + j, widened(bias.halves() + j));
  return multiply_and(Store<true>{result, floats}) ? success : failure;
}
#endif

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle query_, AtenTensorHandle key_, AtenTensorHandle value_,
                                        int32_t is_causal, double scale, AtenTensorHandle* output_,
                                        AtenTensorHandle* normalizers_) {
  const Tensor query(query_), key(key_), value(value_);
  if (!are_there({&query, &key, &value})) return failure;
  const int64_t *size = query.sizes;
  if (!make_heads(query, output_) ||
      !make({size[0], size[1], size[2]}, {size[1] * size[2], 1, size[1]}, aoti_torch_dtype_float32(), normalizers_))
    return failure;
  const Tensor output(*output_), normalizers(*normalizers_);
  const Shape shape = shape_of(query, is_causal, scale);
  return for_each_head<ForwardHead>(query, shape, [&](ForwardHead& state, int64_t head) {
    state.run(query.head(head), key.head(head), value.head(head), output.head(head),
              normalizers.normalizers(head));
  });
}

AOTITorchError aoti_torch_cpu_attention_backward(AtenTensorHandle gradient_, AtenTensorHandle query_,
                                                 AtenTensorHandle key_, AtenTensorHandle value_,
                                                 AtenTensorHandle output_, AtenTensorHandle normalizers_,
                                                 int32_t is_causal, double scale, AtenTensorHandle* for_query_,
                                                 AtenTensorHandle* for_key_, AtenTensorHandle* for_value_) {
  const Tensor gradient(gradient_), query(query_), key(key_), value(value_), output(output_),
      normalizers(normalizers_);
  if (!are_there({&gradient, &query, &key, &value, &output, &normalizers})) return failure;
  if (!make_heads(query, for_query_) || !make_heads(query, for_key_) || !make_heads(query, for_value_)) return failure;
  const Tensor for_query(*for_query_), for_key(*for_key_), for_value(*for_value_);
  const Shape shape = shape_of(query, is_causal, scale);
  return for_each_head<BackwardHead>(query, shape, [&](BackwardHead& state, int64_t head) {
    state.run({query.head(head), key.head(head), value.head(head), output.head(head), gradient.head(head),
               normalizers.normalizers(head)},
              {for_query.head(head), for_key.head(head), for_value.head(head)});
  });
}

#ifdef PENSTOCK_UNIT
AOTITorchError aoti_torch_cpu_product(AtenTensorHandle left, AtenTensorHandle right, AtenTensorHandle* result) {
  return product_of(left, right, nullptr, result);
}

AOTITorchError aoti_torch_cpu_product_and_bias(AtenTensorHandle left, AtenTensorHandle right, AtenTensorHandle bias,
                                               AtenTensorHandle* result) {
  return product_of(left, right, bias, result);
}
#endif

AOTITorchError aoti_torch_cpu_cross_entropy_(AtenTensorHandle logits_, AtenTensorHandle targets_,
                                             AtenTensorHandle weights_, AtenTensorHandle z_loss_,
                                             int64_t vocabulary, AtenTensorHandle* nll_,
                                             AtenTensorHandle* normalizers_) {
  const Tensor logits(logits_), targets(targets_), weights(weights_), z_loss(z_loss_);
  if (!are_there({&logits, &targets, &weights, &z_loss})) return failure;
  const Matrix rows = logits.matrix();
  for (AtenTensorHandle* made : {nll_, normalizers_})
    if (!make({rows.rows}, {1}, aoti_torch_dtype_float32(), made)) return failure;
  const Tensor nll(*nll_), normalizers(*normalizers_);
  bool fits = true;
#pragma omp parallel for schedule(dynamic, 8)
  for (int64_t i = 0; i < rows.rows; i++) {
    const int64_t target = static_cast<int64_t*>(targets.data)[i];
    if (target < 0 || target >= vocabulary) {
#pragma omp atomic write
      fits = false;
      continue;
    }
    const RowLoss loss = cross_entropy(rows.at(i, 0), rows.columns, vocabulary, target, weights.floats()[i], *z_loss.floats());
    nll.floats()[i] = loss.nll;
    normalizers.floats()[i] = loss.normalizer;
  }
  if (!fits) std::fputs("a target is outside the vocabulary\n", stderr);
  return fits ? success : failure;
}
}
