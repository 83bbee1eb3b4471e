// Depthwise convolutions over lines: one output channel for each input channel, one or two dimensions.
//
// 64 channels at a time. For every line of outputs, the input lines that its taps read are zipped into quads once (4
// lines of the kernel of one channel side by side), so that a column of the kernel is one or a few dot products: with 3
// x 3 taps, 3 instructions for 16 channels. Activations are made unsigned (a + 128), weights are signed codes w, hence
// t = sum((a + 128) w) - (128 + za) sum(w), and that correction is where the sums begin. Bound by the dot products and,
// for int8 results, as much by their rounding.
#pragma once
#include "conv_rows.inl.h"

namespace halfbyte {
namespace {

constexpr int64_t kLineChannels = kDepthwiseChannels;
constexpr int64_t kLineBytes = 4 * kLineChannels;  // of one column and four lines of the kernel

bool is_depthwise(const ConvShape& s, const TiledWeight& w) {
  return !s.transposed && s.groups == s.in_channels && s.out_channels == s.in_channels && s.kernel[0] == 1 &&
         s.in[0] == 1 && s.padding[0] == 0 && s.in_channels >= 8 && w.zero_point == nullptr && w.shape.groups() == 1;
}

struct DepthwiseSizes {
  int64_t quads, columns;  // quads of kernel lines; input columns of a line, padding included

  explicit DepthwiseSizes(const ConvShape& s)
      : quads(ceil_div(s.kernel[1], 4)),
        columns((s.out[2] - 1) * s.stride[2] + (s.kernel[2] - 1) * s.dilation[2] + 1) {}
};

int64_t depthwise_scratch_bytes(const ConvShape& s, const TileShape& weight) {
  const DepthwiseSizes sizes(s);
  return 64 * 4 + sizes.columns * sizes.quads * kLineBytes + s.kernel[2] * sizes.quads * kLineBytes +
         kMaxPanels * weight.padded_in() * kPanel;
}

// What 64 channels share; vectors in zip order.
struct DepthwiseBlock {
  int64_t channel, present;
  const int8_t* end;       // of all codes
  const uint8_t* weights;  // [kernel columns, quads, 256 bytes]
  alignas(64) int32_t start[4][16];
  alignas(64) float scale[4][16], bias[4][16];
};

inline int zip_channel(int vector, int element) { return element / 4 * 16 + vector * 4 + element % 4; }

void prepare_block(const ConvShape& s, const TiledWeight& w, const float* bias, int32_t act_zero_point, int64_t channel,
                   uint8_t* unpacked, uint8_t* weights, DepthwiseBlock& block) {
  const int bits = w.shape.bits;
  const int64_t taps = s.taps(), quads = ceil_div(s.kernel[1], 4), panel_bytes = w.shape.padded_in() * kPanel;
  block.channel = channel, block.present = std::min(kLineChannels, s.out_channels - channel), block.weights = weights;
  const int64_t panels = ceil_div(block.present, kPanel);
  with_bits(bits, [&](auto b) {
    for (int64_t p = 0; p < panels; ++p) {
      unpack_units<b>(w.codes + (channel / kPanel + p) * w.shape.panel_bytes(), w.shape.padded_in() / k_unit(b),
                      unpacked + p * panel_bytes);
    }
  });
  std::memset(weights, 0, static_cast<size_t>(s.kernel[2] * quads * kLineBytes));
  float scales[64] = {}, biases[64] = {};
  int32_t sums[64] = {};
  for (int64_t p = 0; p < panels; ++p) store_f32(scales + p * kPanel, load_scales(w, 0, channel / kPanel + p));
  if (bias != nullptr) std::memcpy(biases, bias + channel, static_cast<size_t>(block.present) * sizeof(float));
  const int factor = bits == 1 ? 2 : 1, center = bits == 1 ? 1 : 1 << (bits - 1);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t ky = tap / s.kernel[2], kx = tap % s.kernel[2];
    uint8_t* column = weights + (kx * quads + ky / 4) * kLineBytes + ky % 4;
    for (int64_t p = 0; p < panels; ++p) {  // a panel is a lane
      const uint8_t* from = unpacked + p * panel_bytes + tap / 4 * 64 + tap % 4;
      const int64_t count = std::min(kPanel, block.present - p * kPanel);
      for (int64_t c = 0; c < count; ++c) {
        const int weight = factor * from[4 * c] - center;
        sums[p * kPanel + c] += weight;
        column[c / 4 * 64 + (p * 4 + c % 4) * 4] = static_cast<uint8_t>(weight);
      }
    }
  }
  for (int v = 0; v < 4; ++v) {
    for (int e = 0; e < 16; ++e) {
      const int c = zip_channel(v, e);
      block.start[v][e] = -(128 + act_zero_point) * sums[c];
      block.scale[v][e] = scales[c], block.bias[v][e] = biases[c];
    }
  }
}

// 64 channels of a pixel as unsigned activations; past the present ones anything, such as the next pixel's.
HALFBYTE_INLINE U8x64 load_channels(const int8_t* p, const DepthwiseBlock& block) {
  const U8x64 flip = set_bytes(0x80);
  if (block.end - p >= kLineChannels) return xor_rows(load_row(reinterpret_cast<const uint8_t*>(p)), flip);
  uint8_t whole[kLineChannels] = {};
  std::memcpy(whole, p, static_cast<size_t>(block.present));
  return xor_rows(load_row(whole), flip);
}

// Quads of all columns that the outputs of line `oy` read.
void zip_line(const ConvShape& s, const DepthwiseSizes& sizes, const int8_t* codes, int32_t zero_point,
              const DepthwiseBlock& block, int64_t oy, uint8_t* line) {
  const U8x64 outside = set_bytes(static_cast<uint8_t>(zero_point + 128));
  for (int64_t quad = 0; quad < sizes.quads; ++quad) {
    const int8_t* lines[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t ky = 4 * quad + i, iy = oy * s.stride[1] - s.padding[1] + ky * s.dilation[1];
      const bool inside = ky < s.kernel[1] && iy >= 0 && iy < s.in[1];
      lines[i] = inside ? codes + iy * s.in[2] * s.in_channels + block.channel : nullptr;
    }
    for (int64_t column = 0; column < sizes.columns; ++column) {
      const int64_t ix = column - s.padding[2];
      const bool inside = ix >= 0 && ix < s.in[2];
      U8x64 rows[4];
      unroll<4>([&](auto i) {
        rows[i] = inside && lines[i] != nullptr ? load_channels(lines[i] + ix * s.in_channels, block) : outside;
      });
      store_zipped(rows, line + (column * sizes.quads + quad) * kLineBytes);
    }
  }
}

// Results of one output pixel from its sums.
HALFBYTE_INLINE void finish_pixel(const DepthwiseBlock& block, const ConvResults& y, float act_scale, bool has_bias,
                                  int64_t pixel, const I32x16 (&sums)[4]) {
  const F32x16 factor = set_f32(act_scale), nothing = set_f32(0.0f);
  F32x16 values[4];
  unroll<4>([&](auto v) {
    const F32x16 folded = fma_f32(load_f32(block.scale[v]), to_float(sums[v]), nothing);
    values[v] = has_bias ? fma_f32(factor, folded, load_f32(block.bias[v])) : mul_f32(factor, folded);
  });
  const bool codes_only = y.floats == nullptr && y.residual == nullptr && y.added == nullptr;
  if (!codes_only || y.activation != Activation::kNone) {
    unzip(values);
    for (int64_t v = 0; v * kPanel < block.present; ++v) {
      store_finished(y, pixel, block.channel + v * kPanel, 0, std::min(kPanel, block.present - v * kPanel), values[v]);
    }
    return;
  }
  I32x16 codes[4];
  unroll<4>([&](auto v) { codes[v] = requantized(values[v], y.requantization); });
  const U8x64 packed = pack_codes(codes);
  auto* to = reinterpret_cast<uint8_t*>(y.codes + pixel * y.code_stride + block.channel);
  if (block.present == kLineChannels) return store_row(to, packed);
  uint8_t whole[kLineChannels];
  store_row(whole, packed);
  int64_t c = 0;
  for (; c + kPanel <= block.present; c += kPanel) std::memcpy(to + c, whole + c, kPanel);
  for (; c < block.present; ++c) to[c] = whole[c];
}

constexpr int kLinePixels = 4;  // outputs that share the weights in registers

// Taps: columns of a kernel of at most four lines that are known when compiling; 0: any kernel.
template <int Pixels, int Taps>
void line_pixels(const ConvShape& s, const DepthwiseSizes& sizes, const DepthwiseBlock& block, const uint8_t* line,
                 const ConvResults& y, float act_scale, bool has_bias, int64_t ox, int64_t pixel) {
  I32x16 sums[Pixels][4];
  const int64_t steps = sizes.quads * kLineBytes;
  const auto add = [&](auto v, const uint8_t* column, const uint8_t* weights) __attribute__((always_inline)) {
    const QuadWeights w = load_quad_weights(weights);
    unroll<Pixels>([&](auto p) { sums[p][v] = dot_quads(sums[p][v], load_row(column + p * s.stride[2] * steps), w); });
  };
  unroll<4>([&](auto v) {
    unroll<Pixels>([&](auto p) { sums[p][v] = load_i32(block.start[v]); });
    const uint8_t* column = line + ox * s.stride[2] * steps + v * 64;
    const uint8_t* weights = block.weights + v * 64;
    if constexpr (Taps > 0) {
      unroll<Taps>([&](auto kx) { add(v, column + kx * s.dilation[2] * kLineBytes, weights + kx * kLineBytes); });
    } else {
      for (int64_t kx = 0; kx < s.kernel[2]; ++kx, column += s.dilation[2] * steps, weights += steps) {
        for (int64_t quad = 0; quad < sizes.quads; ++quad) {
          add(v, column + quad * kLineBytes, weights + quad * kLineBytes);
        }
      }
    }
  });
  unroll<Pixels>([&](auto p) { finish_pixel(block, y, act_scale, has_bias, pixel + p, sums[p]); });
}

template <int Taps>
void depthwise_line(const ConvShape& s, const DepthwiseSizes& sizes, const DepthwiseBlock& block, const uint8_t* line,
                    const ConvResults& results, float act_scale, bool has_bias, int64_t pixel) {
  const ConvResults y = results;  // a copy, so that the compiler knows that stores of codes do not change it
  int64_t ox = 0;
  for (; ox + kLinePixels <= s.out[2]; ox += kLinePixels) {
    line_pixels<kLinePixels, Taps>(s, sizes, block, line, y, act_scale, has_bias, ox, pixel + ox);
  }
  for (; ox < s.out[2]; ++ox) {
    line_pixels<1, Taps>(s, sizes, block, line, y, act_scale, has_bias, ox, pixel + ox);
  }
}

void depthwise_lines(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const ConvResults& y, int64_t sample,
                     int64_t channel_begin, int64_t channel_end, int64_t line_begin, int64_t line_end,
                     const float* bias, void* memory) {
  Cutter scratch = {static_cast<std::byte*>(memory)};
  const DepthwiseSizes sizes(s);
  auto* line = scratch.take<uint8_t>(sizes.columns * sizes.quads * kLineBytes);
  auto* weights = scratch.take<uint8_t>(s.kernel[2] * sizes.quads * kLineBytes);
  auto* unpacked = scratch.take<uint8_t>(kMaxPanels * w.shape.padded_in() * kPanel);
  const int8_t* codes = x.codes + sample * s.in_pixels() * s.in_channels;
  const float act_scale = x.scale[sample];
  const auto multiply = sizes.quads == 1 && s.kernel[2] == 3 ? depthwise_line<3> : depthwise_line<0>;
  for (int64_t channel = channel_begin; channel < channel_end; channel += kLineChannels) {
    DepthwiseBlock block;
    block.end = x.codes + s.batch * s.in_pixels() * s.in_channels;
    prepare_block(s, w, bias, x.zero_point, channel, unpacked, weights, block);
    for (int64_t oy = line_begin; oy < line_end; ++oy) {
      zip_line(s, sizes, codes, x.zero_point, block, oy, line);
      const int64_t pixel = sample * s.out_pixels() + oy * s.out[2];
      multiply(s, sizes, block, line, y, act_scale, bias != nullptr, pixel);
    }
  }
}

}  // namespace
}  // namespace halfbyte
