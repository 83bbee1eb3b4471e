// What stands around the products of a convolution: activations to channels-last codes, rows gathered from them,
// results to int8 or to channels-first. Bound by memory.
#pragma once
#include <cfloat>

#include "conv_simd.inl.h"
#include "halfbyte/conv.h"

namespace halfbyte {
namespace {

// 16 elements of any float type from index i on; those past `count` read as 0.
HALFBYTE_INLINE F32x16 load_elements(const void* x, FloatType type, int64_t i, int64_t count) {
  if (type == FloatType::kFloat32) {
    return load_partial(static_cast<const float*>(x) + i, count, [](const float* p) { return load_f32(p); });
  }
  const uint16_t* half = static_cast<const uint16_t*>(x) + i;
  if (type == FloatType::kFloat16) return load_partial(half, count, [](const uint16_t* p) { return load_f16(p); });
  return load_partial(half, count, [](const uint16_t* p) { return load_bf16(p); });
}

HALFBYTE_INLINE void store_bytes(int8_t* p, I32x16 x, int64_t count) {
  if (count >= kPanel) return store_low_bytes(p, x);
  int8_t whole[kPanel];
  store_low_bytes(whole, x);
  std::memcpy(p, whole, static_cast<size_t>(count));
}

float conv_largest_magnitude(const void* x, FloatType type, int64_t count) {
  F32x16 largest[4] = {set_f32(0.0f), set_f32(0.0f), set_f32(0.0f), set_f32(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    unroll<4>([&](auto j) { largest[j] = max_abs(load_elements(x, type, i + 16 * j, 16), largest[j]); });
  }
  for (; i < count; i += 16) largest[0] = max_abs(load_elements(x, type, i, count - i), largest[0]);
  unroll<3>([&](auto j) { largest[0] = max_abs(largest[j + 1], largest[0]); });
  float lanes[16], result = 0.0f;
  store_f32(lanes, largest[0]);
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

void quantize_pixels(const void* x, FloatType type, bool channels_first, int64_t channels, int64_t pixels,
                     int64_t begin, int64_t end, float scale, int32_t zero_point, int32_t lowest, int8_t* codes) {
  const F32x16 inverse = set_f32(1.0f / scale);
  const I32x16 zero = set_i32(zero_point);
  const auto lo = static_cast<float>(lowest - zero_point), hi = static_cast<float>(127 - zero_point);
  const auto quantize = [&](int64_t i, int64_t count) {
    return add_i32(round_clamped(mul_f32(load_elements(x, type, i, count), inverse), lo, hi), zero);
  };
  if (!channels_first) {
    for (int64_t i = begin * channels; i < end * channels; i += 16) {
      store_bytes(codes + i, quantize(i, end * channels - i), end * channels - i);
    }
    return;
  }
  // 16 pixels of 16 channels at a time, turned round in a buffer.
  for (int64_t pixel = begin; pixel < end; pixel += 16) {
    const int64_t count = std::min<int64_t>(16, end - pixel);
    for (int64_t channel = 0; channel < channels; channel += 16) {
      const int64_t present = std::min<int64_t>(16, channels - channel);
      int8_t block[16][16];
      for (int64_t c = 0; c < present; ++c) {
        store_low_bytes(block[c], quantize((channel + c) * pixels + pixel, count));
      }
      for (int64_t p = 0; p < count; ++p) {
        int8_t* out = codes + (pixel + p) * channels + channel;
        for (int64_t c = 0; c < present; ++c) out[c] = block[c][p];
      }
    }
  }
}

struct Ones {
  uint8_t bytes[64];
  constexpr Ones() : bytes() {
    for (uint8_t& byte : bytes) byte = 1;
  }
};

inline int32_t sum_bytes(const int8_t* codes, int64_t count) {
  static constexpr Ones kOnes;
  int32_t sum = 0;
  int64_t i = 0;
  if (count >= 64) {
    const QuadWeights ones = load_quad_weights(kOnes.bytes);
    I32x16 sums = set_i32(0);
    for (; i + 64 <= count; i += 64) {  // of unsigned codes + 128
      const U8x64 row = xor_rows(load_row(reinterpret_cast<const uint8_t*>(codes + i)), set_bytes(0x80));
      sums = dot_quads(sums, row, ones);
    }
    int32_t lanes[16];
    store_i32(lanes, sums);
    for (int32_t lane : lanes) sum += lane;
    sum -= static_cast<int32_t>(128 * i);
  }
  for (; i < count; ++i) sum += codes[i];
  return sum;
}

void gather_rows(const ConvShape& shape, const TileShape& weight, const int8_t* codes, int64_t group, int64_t begin,
                 int64_t end, int8_t* row, int32_t* pixels, const QuantizedRows& out) {
  const int64_t rows = end - begin, inputs = shape.group_inputs(), taps = shape.taps();
  for (int64_t tap = 0; tap < taps; ++tap) tap_pixels(shape, tap, begin, end, pixels + tap * rows);
  const int64_t stride = code_stride(weight), sums = weight.groups() * chunks_per_group(weight);
  const auto bytes = static_cast<size_t>(inputs);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t pixel = pixels[tap * rows + r];
      if (pixel < 0) {
        std::memset(row + tap * inputs, out.zero_point, bytes);
      } else {
        std::memcpy(row + tap * inputs, codes + pixel * shape.in_channels + group * inputs, bytes);
      }
    }
    int8_t* to = out.codes + r * stride;
    int32_t* sum = out.chunk_sum + r * sums;
    for (int64_t g = 0; g < weight.groups(); ++g) {
      const int8_t* from = row + g * weight.group_size;
      std::memcpy(to, from, static_cast<size_t>(weight.group_size));
      std::memset(to + weight.group_size, 0, static_cast<size_t>(weight.padded_group() - weight.group_size));
      for (int64_t k = 0; k < weight.padded_group(); k += kMaxChunk) {
        *sum++ = sum_bytes(from + k, std::clamp<int64_t>(weight.group_size - k, 0, kMaxChunk));
      }
      to += weight.padded_group();
    }
  }
}

HALFBYTE_INLINE F32x16 add_residual(F32x16 value, const int8_t* residual, const Requantization& r) {
  const I32x16 difference = sub_i32(load_s8_to_i32(residual), set_i32(r.residual_zero_point));
  return add_f32(value, mul_f32(to_float(difference), set_f32(r.residual_scale)));
}

HALFBYTE_INLINE I32x16 requantized(F32x16 value, const Requantization& r) {
  const auto lo = static_cast<float>(r.lowest - r.zero_point), hi = static_cast<float>(r.highest - r.zero_point);
  return add_i32(round_clamped(mul_f32(value, set_f32(r.inverse_scale)), lo, hi), set_i32(r.zero_point));
}

HALFBYTE_INLINE F32x16 activated(F32x16 value, const ConvResults& y) {
  switch (y.activation) {
    case Activation::kNone:
      return value;
    case Activation::kClamp:
      return smaller(set_f32(y.high), larger(set_f32(y.low), value));
    case Activation::kLeakyRelu:
      return larger(mul_f32(value, set_f32(y.low)), value);
    case Activation::kHardswish:
    case Activation::kHardsigmoid:
      break;
  }
  const F32x16 shifted = larger(set_f32(0.0f), add_f32(value, set_f32(3.0f)));
  const F32x16 gate = smaller(set_f32(6.0f), shifted);
  return div_f32(y.activation == Activation::kHardswish ? mul_f32(value, gate) : gate, set_f32(6.0f));
}

// Stores the channels [channel + lo, channel + hi) of one pixel, 0 <= lo < hi <= 16, from what the product gave.
HALFBYTE_INLINE void store_finished(const ConvResults& y, int64_t pixel, int64_t channel, int64_t lo, int64_t hi,
                                    F32x16 value) {
  const bool all = lo == 0 && hi == kPanel;
  const int64_t at = pixel * y.channels + channel;
  if (y.added != nullptr) {
    float whole[kPanel] = {};
    if (!all) std::memcpy(whole + lo, y.added + at + lo, static_cast<size_t>(hi - lo) * sizeof(float));
    value = add_f32(value, load_f32(all ? y.added + at : whole));
  }
  if (y.residual != nullptr) {
    int8_t whole[kPanel] = {};
    if (!all) std::memcpy(whole + lo, y.residual + at + lo, static_cast<size_t>(hi - lo));
    value = add_residual(value, all ? y.residual + at : whole, y.requantization);
  }
  value = activated(value, y);
  if (y.floats != nullptr) {
    float whole[kPanel];
    store_f32(all ? y.floats + at : whole, value);
    if (!all) std::memcpy(y.floats + at + lo, whole + lo, static_cast<size_t>(hi - lo) * sizeof(float));
  }
  if (y.codes != nullptr) {
    int8_t whole[kPanel];
    int8_t* to = y.codes + pixel * y.code_stride + channel;
    store_low_bytes(all ? to : whole, requantized(value, y.requantization));
    if (!all) std::memcpy(to + lo, whole + lo, static_cast<size_t>(hi - lo));
  }
}

void finish(const float* y, int64_t begin, int64_t end, const ConvResults& to) {
  for (int64_t pixel = begin; pixel < end; ++pixel, y += to.channels) {
    for (int64_t channel = 0; channel < to.channels; channel += kPanel) {
      const int64_t count = std::min(kPanel, to.channels - channel);
      store_finished(to, pixel, channel, 0, count, load_elements(y, FloatType::kFloat32, channel, count));
    }
  }
}

void to_channels_first(const float* y, int64_t channels, int64_t pixels, int64_t begin, int64_t end, float* out) {
  for (int64_t pixel = begin; pixel < end; pixel += 16) {
    const int64_t pixel_end = std::min(pixel + 16, end);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = pixel; p < pixel_end; ++p) out[c * pixels + p] = y[p * channels + c];
    }
  }
}

}  // namespace
}  // namespace halfbyte
