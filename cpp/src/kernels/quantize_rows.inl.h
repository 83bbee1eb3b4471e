// Activations made ready for the products: int8 codes with their sums, or padded float32 with theirs. Bound by the
// latency of three passes over one row, which stays in the L1 cache.
#pragma once
#include <cfloat>

#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

HALFBYTE_INLINE F32x16 load_floats(const float* p, int64_t count) {
  return load_partial(p, count, [](const float* q) { return load_f32(q); });
}

inline int32_t sum_lanes(I32x16 x) {
  int32_t lanes[16];
  store_i32(lanes, x);
  int32_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

inline float largest_magnitude(const float* x, int64_t count) {
  F32x16 largest[4] = {set_f32(0.0f), set_f32(0.0f), set_f32(0.0f), set_f32(0.0f)};
  int64_t k = 0;
  for (; k + 64 <= count; k += 64)
    unroll<4>([&](auto i) { largest[i] = max_abs(load_f32(x + k + 16 * i), largest[i]); });
  for (; k < count; k += 16) largest[0] = max_abs(load_floats(x + k, count - k), largest[0]);
  unroll<3>([&](auto i) { largest[0] = max_abs(largest[i + 1], largest[0]); });
  float lanes[16], result = 0.0f;
  store_f32(lanes, largest[0]);
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

// Codes clamp(round(x * inverse), lo, hi) + zero_point of `count` inputs; returns their sum. `room` bytes may be
// written.
inline int32_t quantize_run(const float* x, int64_t count, float inverse, float lo, float hi, int32_t zero_point,
                            int8_t* codes, int64_t room) {
  const F32x16 factor = set_f32(inverse);
  const I32x16 zero = set_i32(zero_point);
  I32x16 sum = set_i32(0);
  for (int64_t k = 0; k < count; k += 16) {
    const I32x16 q = add_i32(round_clamped(mul_f32(load_floats(x + k, count - k), factor), lo, hi), zero);
    sum = add_i32(sum, q);
    if (room - k >= 16) {
      store_low_bytes(codes + k, q);
    } else {
      int8_t whole[16];
      store_low_bytes(whole, q);
      std::memcpy(codes + k, whole, static_cast<size_t>(room - k));
    }
  }
  // The lanes past `count` held x = 0, so each added the zero point.
  return sum_lanes(sum) - static_cast<int32_t>(round_up(count, 16) - count) * zero_point;
}

inline void quantize_row(const float* x, const TileShape& shape, float scale, float lo, float hi, int32_t zero_point,
                         int8_t* codes, int32_t* chunk_sum) {
  const float inverse = 1.0f / scale;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const int64_t begin = group * shape.group_size;
    const int64_t count = std::min(shape.group_size, shape.in_features - begin);
    for (int64_t k = 0; k < shape.padded_group(); k += kMaxChunk) {
      const int64_t present = std::clamp<int64_t>(count - k, 0, kMaxChunk);
      *chunk_sum++ =
          quantize_run(x + begin + k, present, inverse, lo, hi, zero_point, codes + k, shape.padded_group() - k);
    }
    std::memset(codes + count, 0, static_cast<size_t>(shape.padded_group() - count));
    codes += shape.padded_group();
  }
}

void quantize_rows_dynamic(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                           const QuantizedRows& out) {
  const int64_t stride = code_stride(shape), sums = shape.groups() * chunks_per_group(shape);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float scale = std::max(largest_magnitude(x + row * ldx, shape.in_features) / 127.0f, FLT_MIN);
    out.scale[row] = scale;
    quantize_row(x + row * ldx, shape, scale, -127.0f, 127.0f, 0, out.codes + row * stride, out.chunk_sum + row * sums);
  }
}

void quantize_rows_static(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                          float scale, const QuantizedRows& out) {
  const int64_t stride = code_stride(shape), sums = shape.groups() * chunks_per_group(shape);
  const int32_t zero = out.zero_point;
  for (int64_t row = row_begin; row < row_end; ++row) {
    out.scale[row] = scale;
    quantize_row(x + row * ldx, shape, scale, static_cast<float>(-128 - zero), static_cast<float>(127 - zero), zero,
                 out.codes + row * stride, out.chunk_sum + row * sums);
  }
}

void pad_rows(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape, float* out,
              float* group_sum) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* padded = out + row * float_stride(shape);
    for (int64_t group = 0; group < shape.groups(); ++group) {
      const float* from = x + row * ldx + group * shape.group_size;
      const int64_t count = std::min(shape.group_size, shape.in_features - group * shape.group_size);
      F32x16 sum = set_f32(0.0f);
      for (int64_t k = 0; k < count; k += 16) {
        const F32x16 values = load_floats(from + k, count - k);
        sum = add_f32(sum, values);
        store_partial(padded + k, values, shape.padded_group() - k);
      }
      for (int64_t k = round_up(count, 16); k < shape.padded_group(); ++k) padded[k] = 0.0f;
      float lanes[16];
      store_f32(lanes, sum);
      for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      group_sum[row * shape.groups() + group] = lanes[0];
      padded += shape.padded_group();
    }
  }
}

}  // namespace
}  // namespace halfbyte
