#include "matmul_reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

namespace halfbyte::reference {
namespace {

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

float half_to_float(uint16_t h) {
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  float x;
  if (exponent == 0) {
    x = std::ldexp(static_cast<float>(mantissa), -24);
  } else if (exponent == 31) {
    x = bits_to_float(0x7f800000u | (mantissa << 13));
  } else {
    x = std::ldexp(static_cast<float>(mantissa | 0x400u), static_cast<int>(exponent) - 25);
  }
  return (h & 0x8000u) ? -x : x;
}

// A weight taken apart: plain codes and the qparams of the header.
class Weight {
 public:
  explicit Weight(const TiledWeight& w)
      : w_(w), codes_(static_cast<size_t>(w.shape.out_features * w.shape.in_features)) {
    unpack_tiles(w.codes, w.shape, 0, w.shape.panels(), codes_.data());
  }
  bool binary() const { return w_.shape.bits == 1 && w_.zero_point == nullptr && w_.codebook == nullptr; }
  int32_t code(int64_t o, int64_t k) const { return codes_[static_cast<size_t>(o * w_.shape.in_features + k)]; }
  int32_t multiplier() const { return binary() ? 2 : 1; }
  int32_t zero(int64_t g, int64_t o) const {
    if (w_.zero_point != nullptr) return w_.zero_point[g * w_.shape.out_features + o];
    return binary() ? 1 : 1 << (w_.shape.bits - 1);
  }
  float scale(int64_t g, int64_t o) const {
    const int64_t at = g * w_.shape.out_features + o;
    if (w_.scale_type == FloatType::kFloat32) return static_cast<const float*>(w_.scale)[at];
    const uint16_t half = static_cast<const uint16_t*>(w_.scale)[at];
    return w_.scale_type == FloatType::kFloat16 ? half_to_float(half) : bits_to_float(uint32_t(half) << 16);
  }

 private:
  const TiledWeight& w_;
  std::vector<uint8_t> codes_;
};

int64_t group_inputs(const TileShape& shape, int64_t group) {
  return std::min(shape.group_size, shape.in_features - group * shape.group_size);
}

void quantize_row(const float* x, const TileShape& shape, float scale, int32_t lo, int32_t hi, int32_t zero,
                  int8_t* codes, int32_t* chunk_sum) {
  const float inverse = 1.0f / scale;
  const int64_t chunks = chunks_per_group(shape);
  for (int64_t g = 0; g < shape.groups(); ++g) {
    std::fill_n(chunk_sum + g * chunks, chunks, 0);
    for (int64_t i = 0; i < shape.padded_group(); ++i) {
      int32_t q = 0;
      if (i < group_inputs(shape, g)) {
        const float r = std::nearbyint(x[g * shape.group_size + i] * inverse);
        const float limited = std::min(std::max(r, static_cast<float>(lo - zero)), static_cast<float>(hi - zero));
        q = std::isnan(r) ? zero : static_cast<int32_t>(limited) + zero;
      }
      codes[g * shape.padded_group() + i] = static_cast<int8_t>(q);
      chunk_sum[g * chunks + i / kMaxChunk] += q;
    }
  }
}

void quantize_rows_dynamic(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                           const QuantizedRows& out) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    float largest = 0.0f;
    for (int64_t k = 0; k < shape.in_features; ++k) {
      const float magnitude = std::fabs(x[row * ldx + k]);
      if (magnitude > largest) largest = magnitude;
    }
    out.scale[row] = std::max(largest / 127.0f, FLT_MIN);
    quantize_row(x + row * ldx, shape, out.scale[row], -127, 127, 0, out.codes + row * code_stride(shape),
                 out.chunk_sum + row * shape.groups() * chunks_per_group(shape));
  }
}

void quantize_rows_static(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                          float scale, const QuantizedRows& out) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    out.scale[row] = scale;
    quantize_row(x + row * ldx, shape, scale, -128, 127, out.zero_point, out.codes + row * code_stride(shape),
                 out.chunk_sum + row * shape.groups() * chunks_per_group(shape));
  }
}

void pad_rows(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape, float* out,
              float* group_sum) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < shape.groups(); ++g) {
      float lanes[16] = {};
      for (int64_t i = 0; i < shape.padded_group(); ++i) {
        const float value = i < group_inputs(shape, g) ? x[row * ldx + g * shape.group_size + i] : 0.0f;
        out[row * float_stride(shape) + g * shape.padded_group() + i] = value;
        if (i < group_inputs(shape, g)) lanes[i % 16] += value;
      }
      for (int half : {8, 4, 2, 1}) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      }
      group_sum[row * shape.groups() + g] = lanes[0];
    }
  }
}

// f(row, output) for the outputs of the panels that exist.
template <class F>
void for_each_output(const TileShape& shape, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                     F&& f) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t o = panel_begin * kPanel; o < std::min(panel_end * kPanel, shape.out_features); ++o) f(row, o);
  }
}

void matmul_int8(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end, const float* bias, float* y, int64_t ldy, void*) {
  const Weight weight(w);
  const TileShape& shape = w.shape;
  for_each_output(shape, row_begin, row_end, panel_begin, panel_end, [&](int64_t row, int64_t o) {
    const int8_t* codes = x.codes + row * code_stride(shape);
    float acc = 0.0f;
    for (int64_t g = 0; g < shape.groups(); ++g) {
      for (int64_t chunk = 0; chunk < chunks_per_group(shape); ++chunk) {
        int64_t exact = 0;
        const int64_t end = std::min((chunk + 1) * kMaxChunk, group_inputs(shape, g));
        for (int64_t i = chunk * kMaxChunk; i < end; ++i) {
          const int32_t a = codes[g * shape.padded_group() + i] - x.zero_point;
          exact += a * (weight.multiplier() * weight.code(o, g * shape.group_size + i) - weight.zero(g, o));
        }
        acc = std::fma(weight.scale(g, o), static_cast<float>(static_cast<int32_t>(exact)), acc);
      }
    }
    y[row * ldy + o] = bias == nullptr ? x.scale[row] * acc : std::fma(x.scale[row], acc, bias[o]);
  });
}

void matmul_float(const TiledWeight& w, const float* x, const float* group_sum, int64_t row_begin, int64_t row_end,
                  int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void*) {
  const Weight weight(w);
  const TileShape& shape = w.shape;
  const int32_t center = 1 << (shape.bits - 1);
  const auto value = [&](int32_t code) {
    return w.codebook == nullptr ? static_cast<float>(code - center) : w.codebook[code];
  };
  for_each_output(shape, row_begin, row_end, panel_begin, panel_end, [&](int64_t row, int64_t o) {
    float acc = 0.0f;
    for (int64_t g = 0; g < shape.groups(); ++g) {
      const float* from = x + row * float_stride(shape) + g * shape.padded_group();
      const float sum_x = group_sum[row * shape.groups() + g];
      float p = 0.0f;
      for (int64_t i = 0; i < group_inputs(shape, g); ++i) {
        p = std::fma(from[i], value(weight.code(o, g * shape.group_size + i)), p);
      }
      if (w.zero_point != nullptr) p = std::fma(static_cast<float>(center - weight.zero(g, o)), sum_x, p);
      if (weight.binary()) p = std::fma(2.0f, p, sum_x);
      acc = std::fma(weight.scale(g, o), p, acc);
    }
    y[row * ldy + o] = bias == nullptr ? acc : acc + bias[o];
  });
}

}  // namespace

MatmulKernels matmul_kernels() {
  return {.quantize_rows_dynamic = quantize_rows_dynamic,
          .quantize_rows_static = quantize_rows_static,
          .pad_rows = pad_rows,
          .matmul_int8 = matmul_int8,
          .matmul_float = matmul_float,
          .scratch_bytes = [](const TileShape&) { return int64_t{0}; },
          .panels_per_tile = 1,
          .rows_per_tile = 1,
          .float_rows_per_tile = 1};
}

}  // namespace halfbyte::reference
