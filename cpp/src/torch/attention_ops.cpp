// attention_scores_int8 and attention_values_int8: the two products of attention, of int8 codes found at run time.
//
// Keys and values stand where weights stand elsewhere: codes of each of their rows (tokens), packed into tiles for each
// head. A key's scale is that of an output. A value's scale belongs to an input, so that it is multiplied into the
// attention weights before those are quantized, with a zero point for each row: they are not negative.
#include <algorithm>
#include <vector>

#include "asymmetric_rows.h"
#include "local_buffer.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

struct Heads {
  Tensor a, b;
  int64_t count, rows, inner, outer;  // a [count, rows, inner]; the product has `outer` columns
};

Heads checked_heads(const Tensor& a, const Tensor& b, const char* a_name, const char* b_name, bool values) {
  check_type(a, ScalarType::Float, a_name);
  check_type(b, ScalarType::Float, b_name);
  check(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0), a_name, " and ", b_name,
        " must have three dimensions and the same number of heads");
  const int64_t inner = a.size(2);
  check(b.size(values ? 1 : 2) == inner, b_name, " does not fit ", a_name);
  return {as_contiguous(a), as_contiguous(b), a.size(0), a.size(1), inner, b.size(values ? 2 : 1)};
}

// One thread's memory for one head after another.
class HeadProduct {
 public:
  explicit HeadProduct(const Heads& heads, bool values)
      : heads_(heads),
        shape_{heads.outer, heads.inner, heads.inner, 8},
        rows_(heads.rows + (values ? 1 : 0)),
        tokens_(values ? heads.inner : heads.outer),
        width_(values ? heads.outer : heads.inner) {
    Parts parts;
    const int64_t token_codes = parts.add<int8_t>(tokens_ * code_stride(token_shape()));
    const int64_t token_scales = parts.add<float>(tokens_);
    const int64_t token_sums = parts.add<int32_t>(tokens_ * chunks_per_group(token_shape()));
    const int64_t codes = parts.add<uint8_t>(shape_.out_features * shape_.in_features);
    const int64_t packed = parts.add<uint8_t>(shape_.panels() * shape_.panel_bytes());
    const int64_t row_codes = parts.add<int8_t>(rows_ * code_stride(shape_));
    const int64_t row_scales = parts.add<float>(rows_);
    const int64_t row_sums = parts.add<int32_t>(rows_ * chunks_per_group(shape_));
    const int64_t qparams = parts.add<RowQparams>(rows_);
    const int64_t scaled = parts.add<float>(heads.inner);
    const int64_t acc = parts.add<float>(values ? rows_ * heads.outer : 0);
    const int64_t scratch = parts.add<std::byte>(kernels().matmul.scratch_bytes(shape_));
    std::byte* memory = buffer_.get(parts.bytes());
    token_ = {reinterpret_cast<int8_t*>(memory + token_codes), reinterpret_cast<float*>(memory + token_scales),
              reinterpret_cast<int32_t*>(memory + token_sums), 0};
    row_ = {reinterpret_cast<int8_t*>(memory + row_codes), reinterpret_cast<float*>(memory + row_scales),
            reinterpret_cast<int32_t*>(memory + row_sums), 0};
    codes_ = reinterpret_cast<uint8_t*>(memory + codes);
    packed_ = reinterpret_cast<uint8_t*>(memory + packed);
    qparams_ = reinterpret_cast<RowQparams*>(memory + qparams);
    scaled_ = reinterpret_cast<float*>(memory + scaled);
    acc_ = reinterpret_cast<float*>(memory + acc);
    scratch_ = memory + scratch;
  }

  void scores(int64_t head, float* y) {
    const float* a = of(heads_.a, head, heads_.rows * heads_.inner);
    kernels().matmul.quantize_rows_dynamic(of(heads_.b, head, tokens_ * width_), width_, 0, tokens_, token_shape(),
                                           token_);
    pack([&](int64_t token, int64_t k) { return token_.codes[token * code_stride(token_shape()) + k]; });
    kernels().matmul.quantize_rows_dynamic(a, heads_.inner, 0, rows_, shape_, row_);
    multiply(token_.scale, y);
  }

  void values(int64_t head, float* y) {
    const float* a = of(heads_.a, head, heads_.rows * heads_.inner);
    kernels().matmul.quantize_rows_dynamic(of(heads_.b, head, tokens_ * width_), width_, 0, tokens_, token_shape(),
                                           token_);
    pack([&](int64_t column, int64_t token) { return token_.codes[token * code_stride(token_shape()) + column]; });
    for (int64_t row = 0; row < heads_.rows; ++row) {
      for (int64_t k = 0; k < heads_.inner; ++k) scaled_[k] = a[row * heads_.inner + k] * token_.scale[k];
      quantize_rows_asymmetric(scaled_, 0, row, row + 1, shape_, row_, qparams_);
    }
    quantize_ones(heads_.rows, shape_, row_);
    const std::vector<float> one(static_cast<size_t>(shape_.out_features), 1.0f);
    multiply(one.data(), acc_);
    const int64_t columns = heads_.outer;
    for (int64_t row = 0; row < heads_.rows; ++row) {
      finish_row(acc_ + row * columns, acc_ + heads_.rows * columns, qparams_[row], nullptr, y + row * columns, 0,
                 columns);
    }
  }

 private:
  static const float* of(const Tensor& tensor, int64_t head, int64_t size) {
    return static_cast<const float*>(tensor.const_data_ptr()) + head * size;
  }
  TileShape token_shape() const { return {tokens_, width_, width_, 8}; }

  // Tiles of the codes that code_at(output, input) gives.
  template <class F>
  void pack(const F& code_at) {
    const int64_t in = shape_.in_features;
    for (int64_t o = 0; o < shape_.out_features; ++o) {
      for (int64_t k = 0; k < in; ++k) codes_[o * in + k] = static_cast<uint8_t>(code_at(o, k) + 128);
    }
    pack_tiles(codes_, shape_, 0, shape_.panels(), packed_);
  }

  void multiply(const float* scale, float* y) {
    const TiledWeight weight = {
        .shape = shape_, .codes = packed_, .scale = scale, .scale_type = FloatType::kFloat32, .zero_point = nullptr};
    kernels().matmul.matmul_int8(weight, row_, 0, rows_, 0, shape_.panels(), nullptr, y, shape_.out_features, scratch_);
  }

  const Heads& heads_;
  TileShape shape_;
  int64_t rows_, tokens_, width_;
  LocalBuffer buffer_;
  QuantizedRows token_{}, row_{};
  uint8_t *codes_, *packed_;
  RowQparams* qparams_;
  float *scaled_, *acc_;
  std::byte* scratch_;
};

template <class F>
Tensor product_of_heads(const Heads& heads, bool values, const F& compute) {
  Tensor y = new_tensor({heads.count, heads.rows, heads.outer}, ScalarType::Float);
  if (y.numel() == 0) return y;
  auto* out = static_cast<float*>(y.mutable_data_ptr());
  if (heads.inner == 0) {  // no tokens to attend to
    std::fill_n(out, y.numel(), 0.0f);
    return y;
  }
  parallel_for(heads.count, 1, [&](int64_t begin, int64_t end) {
    HeadProduct product(heads, values);
    for (int64_t head = begin; head < end; ++head) compute(product, head, out + head * heads.rows * heads.outer);
  });
  return y;
}

}  // namespace

Tensor attention_scores_int8(Tensor query, Tensor key) {
  const Heads heads = checked_heads(query, key, "query", "key", false);
  return product_of_heads(heads, false, [](HeadProduct& product, int64_t head, float* y) { product.scores(head, y); });
}

Tensor attention_values_int8(Tensor weights, Tensor value) {
  const Heads heads = checked_heads(weights, value, "weights", "value", true);
  return product_of_heads(heads, true, [](HeadProduct& product, int64_t head, float* y) { product.values(head, y); });
}

}  // namespace halfbyte::ops
