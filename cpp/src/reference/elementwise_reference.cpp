#include "elementwise_reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace halfbyte::reference {
namespace {

struct Qparams {
  float scale;
  int32_t zero_point;
};

Qparams qparams_of(const AffineGrid& grid, int64_t i) {
  const int64_t channel = i / grid.run_length % grid.channels;
  return {grid.scale[channel], grid.zero_point[channel]};
}

int32_t load_code(const void* q, CodeType code, int64_t i) {
  if (code == CodeType::kInt8) return static_cast<const int8_t*>(q)[i];
  if (code == CodeType::kUInt8) return static_cast<const uint8_t*>(q)[i];
  return static_cast<const int32_t*>(q)[i];
}

void store_code(int32_t value, void* q, CodeType code, int64_t i) {
  if (code == CodeType::kInt8) {
    static_cast<int8_t*>(q)[i] = static_cast<int8_t>(value);
  } else if (code == CodeType::kUInt8) {
    static_cast<uint8_t*>(q)[i] = static_cast<uint8_t>(value);
  } else {
    static_cast<int32_t*>(q)[i] = value;
  }
}

// The exact value of a float16 or bfloat16 with `mantissa_bits` and `exponent_bits`.
float widen(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const float sign = (bits & 0x8000) != 0 ? -1.f : 1.f;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0 ? sign * std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - bias - mantissa_bits);
  return sign * std::ldexp(static_cast<float>(mantissa | (1 << mantissa_bits)), exponent - bias - mantissa_bits);
}

// Rounds half to even through the exponent of the value: a multiple of 2^(exponent - mantissa_bits).
uint16_t narrow(float value, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (mantissa_bits - 1));
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent = magnitude == 0 ? 1 - bias : std::max(std::ilogb(magnitude), 1 - bias);
  const double units = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  // `units` has the hidden bit for normal numbers; rounding up to the next power of two carries into the exponent.
  const int64_t bits = static_cast<int64_t>(units) + (static_cast<int64_t>(exponent + bias - 1) << mantissa_bits);
  return static_cast<uint16_t>(sign | std::min<int64_t>(bits, infinity));
}

// round(x / scale) clamped, in codes counted from the zero point; `inside` tells whether the clamp changed nothing.
float code_of(float x, const Qparams& q, const AffineGrid& grid, bool* inside) {
  const float rounded = std::nearbyint(x * (1.f / q.scale));
  const float lowest = static_cast<float>(grid.qmin - q.zero_point);
  const float highest = static_cast<float>(grid.qmax - q.zero_point);
  *inside = rounded >= lowest && rounded <= highest;
  return std::isnan(rounded) ? rounded : std::clamp(rounded, lowest, highest);
}

void merge(float value, float* lo, float* hi) {
  if (std::isnan(value) || std::isnan(*lo)) {
    *lo = *hi = std::numeric_limits<float>::quiet_NaN();
  } else {
    *lo = std::min(*lo, value + 0.f);
    *hi = std::max(*hi, value + 0.f);
  }
}

}  // namespace

float to_float(const void* x, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(x)[i];
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  return type == FloatType::kBFloat16 ? widen(bits, 8, 7) : widen(bits, 5, 10);
}

void from_float(float value, void* y, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) {
    static_cast<float*>(y)[i] = value;
  } else {
    static_cast<uint16_t*>(y)[i] = type == FloatType::kBFloat16 ? narrow(value, 8, 7) : narrow(value, 5, 10);
  }
}

void fake_quantize(const void* x, void* y, uint8_t* mask, FloatType type, const AffineGrid& grid, int64_t count) {
  if (mask != nullptr) std::fill_n(mask, ceil_div(count, 8), uint8_t{0});
  for (int64_t i = 0; i < count; ++i) {
    const Qparams q = qparams_of(grid, i);
    bool inside;
    from_float((code_of(to_float(x, type, i), q, grid, &inside) + 0.f) * q.scale, y, type, i);
    if (mask != nullptr && inside) mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | 1 << (i % 8));
  }
}

void mask_gradient(const void* grad_out, const uint8_t* mask, void* grad_in, FloatType type, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = (mask[i / 8] >> (i % 8) & 1) != 0;
    from_float(inside ? to_float(grad_out, type, i) : 0.f, grad_in, type, i);
  }
}

void quantize(const void* x, FloatType type, void* q, CodeType code, const AffineGrid& grid, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Qparams qparams = qparams_of(grid, i);
    bool inside;
    const float value = code_of(to_float(x, type, i), qparams, grid, &inside);
    store_code(std::isnan(value) ? qparams.zero_point : static_cast<int32_t>(value) + qparams.zero_point, q, code, i);
  }
}

void dequantize(const void* q, CodeType code, void* y, FloatType type, const AffineGrid& grid, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Qparams qparams = qparams_of(grid, i);
    const float steps = static_cast<float>(load_code(q, code, i)) - static_cast<float>(qparams.zero_point);
    from_float(steps * qparams.scale, y, type, i);
  }
}

void minmax_runs(const void* x, FloatType type, int64_t run_length, int64_t runs, float* lo, float* hi) {
  for (int64_t run = 0; run < runs; ++run) {
    lo[run] = std::numeric_limits<float>::infinity();
    hi[run] = -lo[run];
    for (int64_t i = 0; i < run_length; ++i) merge(to_float(x, type, run * run_length + i), lo + run, hi + run);
  }
}

void minmax_columns(const void* x, FloatType type, int64_t columns, int64_t rows, float* lo, float* hi) {
  for (int64_t i = 0; i < rows * columns; ++i) merge(to_float(x, type, i), lo + i % columns, hi + i % columns);
}

double search_error(const float* w, const float* importance, int64_t count, const SearchOptions& options, float scale,
                    int32_t zero_point) {
  const int half = 1 << (options.bits - 1);
  const AffineGrid grid = {.scale = &scale,
                           .zero_point = &zero_point,
                           .channels = 1,
                           .run_length = count,
                           .qmin = !options.symmetric  ? 0
                                   : options.bits == 8 ? -127
                                                       : -half,
                           .qmax = options.symmetric ? half - 1 : 2 * half - 1,
                           .inverse_scale = nullptr};
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    bool inside;
    const bool binary = options.symmetric && options.bits == 1;
    const float code = binary ? (w[i] < 0 ? -1.f : 1.f) : code_of(w[i], {scale, zero_point}, grid, &inside);
    const double error = static_cast<double>(code * scale) - w[i];
    total += (importance == nullptr ? 1. : importance[i]) * error * error;
  }
  return total;
}

}  // namespace halfbyte::reference
