// Dynamic activations with a zero point for each row: the codes cover [min(x, 0), max(x, 0)].
//
//   lo, hi: least and largest input of the row that is not NaN, zero included
//   s = max((hi - lo)/255, FLT_MIN),  za = -128 - round(lo * (1/s)),  a = clamp(round(x * (1/s)) + za, -128, 127)
//   y = ((acc - za * ones) * s) + bias                       each operation rounded
//
// acc is what the kernels compute of the codes without zero point and scale (matmul.h), ones the same of a row whose
// codes are all 1: the sum of each output's weights. So no kernel knows of zero points that differ between rows, and
// weights are read once. The bits are equal on every level.
#pragma once
#include <algorithm>
#include <cfloat>
#include <vector>

#include "halfbyte/dispatch.h"

namespace halfbyte::ops {

struct RowQparams {
  float scale;
  int32_t zero_point;
};

inline RowQparams asymmetric_qparams(const float* x, int64_t count) {
  float lo = 0.0f, hi = 0.0f;
  if (count > 0) kernels().elementwise.minmax_runs(x, FloatType::kFloat32, count, 0, 1, &lo, &hi);
  if (!(lo <= hi)) {  // NaN somewhere
    lo = hi = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      lo = x[k] < lo ? x[k] : lo;
      hi = x[k] > hi ? x[k] : hi;
    }
  }
  lo = std::min(lo, 0.0f), hi = std::max(hi, 0.0f);
  const float scale = std::max((hi - lo) / 255.0f, FLT_MIN);
  const float steps = std::clamp(lo * (1.0f / scale), -255.0f, 0.0f);
  // Adding 1.5 * 2^23 rounds half to even. inf / inf is NaN, which clamp passes on.
  const auto rounded = steps == steps ? static_cast<int32_t>((steps + 12582912.0f) - 12582912.0f) : 0;
  return {scale, -128 - rounded};
}

// Rows [begin, end) into `out`, whose scales become 1; their qparams into `qparams`.
inline void quantize_rows_asymmetric(const float* x, int64_t ldx, int64_t begin, int64_t end, const TileShape& shape,
                                     QuantizedRows out, RowQparams* qparams) {
  for (int64_t row = begin; row < end; ++row) {
    qparams[row] = asymmetric_qparams(x + row * ldx, shape.in_features);
    out.zero_point = qparams[row].zero_point;
    kernels().matmul.quantize_rows_static(x, ldx, row, row + 1, shape, qparams[row].scale, out);
    out.scale[row] = 1.0f;
  }
}

// Row `row` of `out` becomes the row of ones.
inline void quantize_ones(int64_t row, const TileShape& shape, QuantizedRows out) {
  const std::vector<float> ones(static_cast<size_t>(shape.in_features), 1.0f);
  out.zero_point = 0;
  kernels().matmul.quantize_rows_static(ones.data(), 0, row, row + 1, shape, 1.0f, out);
}

// y[begin, end) of one row from its acc; they may be the same memory.
inline void finish_row(const float* acc, const float* ones, const RowQparams& qparams, const float* bias, float* y,
                       int64_t begin, int64_t end) {
  const auto zero_point = static_cast<float>(qparams.zero_point);
  if (bias == nullptr) {
    for (int64_t o = begin; o < end; ++o) y[o] = (acc[o] - zero_point * ones[o]) * qparams.scale;
  } else {
    for (int64_t o = begin; o < end; ++o) y[o] = (acc[o] - zero_point * ones[o]) * qparams.scale + bias[o];
  }
}

}  // namespace halfbyte::ops
