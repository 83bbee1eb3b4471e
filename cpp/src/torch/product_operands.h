// The checked operands that linear layers and convolutions share: a weight in the tiles layout with its qparams, a
// bias, and qparams of one element.
#pragma once
#include <cfloat>
#include <vector>

#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  OptionalTensor result;
  if (tensor) result.emplace(as_contiguous(*tensor));
  return result;
}

// The tensors are kept alive; `weight` points into them.
struct WeightOperand {
  Tensor qweight, scale;
  OptionalTensor zero_point, bias;
  TiledWeight weight;
};

inline WeightOperand checked_weight(const TileShape& shape, const Tensor& qweight, const Tensor& scale,
                                    const OptionalTensor& zero_point, const OptionalTensor& bias) {
  check_type(qweight, ScalarType::Byte, "qweight");
  check_matrix(qweight, "qweight", shape.panels(), shape.panel_bytes());
  check_matrix(scale, "scale", shape.groups(), shape.out_features);
  if (zero_point) {
    check_type(*zero_point, ScalarType::Byte, "zero_point");
    check_matrix(*zero_point, "zero_point", shape.groups(), shape.out_features);
  }
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == shape.out_features, "bias must have shape [", shape.out_features, "]");
  }
  WeightOperand w = {.qweight = as_contiguous(qweight),
                     .scale = as_contiguous(scale),
                     .zero_point = contiguous_or_none(zero_point),
                     .bias = contiguous_or_none(bias),
                     .weight = {}};
  w.weight = {.shape = shape,
              .codes = static_cast<const uint8_t*>(w.qweight.const_data_ptr()),
              .scale = w.scale.const_data_ptr(),
              .scale_type = float_type(w.scale, "scale"),
              .zero_point = w.zero_point ? static_cast<const uint8_t*>(w.zero_point->const_data_ptr()) : nullptr};
  return w;
}

// A bias as float32: its own data, or a copy.
class FloatBias {
 public:
  explicit FloatBias(const OptionalTensor& bias) {
    if (!bias) return;
    const FloatType type = float_type(*bias, "bias");
    if (type == FloatType::kFloat32) {
      data_ = static_cast<const float*>(bias->const_data_ptr());
    } else {
      copy_.resize(static_cast<size_t>(bias->numel()));
      kernels().elementwise.to_float(bias->const_data_ptr(), type, copy_.data(), bias->numel());
      data_ = copy_.data();
    }
  }
  const float* get() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// One element of a tensor of qparams.
template <class T>
T single(const Tensor& tensor, ScalarType type, const char* name) {
  check_type(tensor, type, name);
  check(tensor.numel() == 1, name, " must have one element, not ", tensor.numel());
  return *static_cast<const T*>(tensor.const_data_ptr());
}

// Qparams of a whole tensor of int8 codes.
struct TensorQparams {
  float scale = 1.0f;
  int32_t zero_point = 0;
};

inline TensorQparams tensor_qparams(const OptionalTensor& scale, const OptionalTensor& zero_point,
                                    const char* scale_name, const char* zero_point_name) {
  check(scale.has_value() || !zero_point.has_value(), zero_point_name, " needs ", scale_name);
  TensorQparams q;
  if (scale) q.scale = single<float>(*scale, ScalarType::Float, scale_name);
  if (zero_point) q.zero_point = single<int32_t>(*zero_point, ScalarType::Int, zero_point_name);
  check(q.scale > 0.0f && q.scale <= FLT_MAX, scale_name, "=", q.scale, " is not positive and finite");
  check(q.zero_point >= -128 && q.zero_point <= 127, zero_point_name, "=", q.zero_point, " is not in [-128, 127]");
  return q;
}

}  // namespace halfbyte::ops
