// Integer convolutions over channels-last int8 codes, with the low-bit weights of packing.h.
//
// A weight [O, C/groups, kernel...] is the matrix [O, I] in the tiles layout, I = taps * C/groups inputs in the order
// (tap, channel), taps in row-major order of the kernel; a transposed convolution's weight [C, O/groups, kernel...] is
// stored as [O, taps * C/groups] too. So rounding, packing and files know matrices only.
//
// Meaning, for each sample n (order of the arithmetic as in matmul.h, equal on every level and for all threads):
//   x[n, c, i] = s_n * (a - za); outside the input x is 0, which is the code za
//   acc = fma(scale[g, o], float(t), acc) over groups and chunks of the I inputs in order, t exact in int32
//   y = fma(s_n, acc, bias)  (bias present)  or  s_n * acc
// int8 outputs continue, rounding after each operation:
//   y = y + float(r - zr) * sr                                            with a residual r
//   q = clamp(round_half_even(clamp(y * (1/so), ..)) + zo, out_min, out_max)     NaN -> zo (clamped)
// Inside a lowered model (program.h) a float addend and an activation come first, y = activation(y + added), and the
// float result may be stored beside the codes.
#pragma once
#include "halfbyte/matmul.h"

namespace halfbyte {

// Sizes of one convolution; spatial arrays are (depth, height, width), 1 in front where there are fewer dimensions.
struct ConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];  // padding: before the first input
  bool transposed;

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t in_pixels() const { return in[0] * in[1] * in[2]; }
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
  int64_t group_inputs() const { return in_channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t row_inputs() const { return taps() * group_inputs(); }
};

constexpr int64_t kDepthwiseChannels = 64;  // that depthwise_lines computes together

// Index of the input pixel that tap `tap` of each of the output pixels [begin, end) reads, or -1 outside the input.
void tap_pixels(const ConvShape& shape, int64_t tap, int64_t begin, int64_t end, int32_t* pixels);

// How float results become int8.
struct Requantization {
  float inverse_scale;  // 1 / out_scale
  int32_t zero_point, lowest, highest;
  float residual_scale;  // where there is a residual
  int32_t residual_zero_point;
};

// What a product reads: codes of all samples and the scale of each.
struct ConvInput {
  const int8_t* codes;  // [batch, in_pixels, in_channels]
  const float* scale;   // [batch]
  int32_t zero_point;
  const int32_t*
      pixel_sum;  // [batch, in_pixels, groups]: sum(a) over the channels of a group; only multiply_rows reads it
};

// The functions that epilogues compute, as torch does, rounding after each operation:
//   kClamp       min(max(y, low), high), NaN stays
//   kLeakyRelu   max(y * low, y), which for slopes up to 1 is y > 0 ? y : y * low
//   kHardswish   y * min(max(y + 3, 0), 6) / 6
//   kHardsigmoid min(max(y + 3, 0), 6) / 6
enum class Activation : int { kNone = 0, kClamp = 1, kLeakyRelu = 2, kHardswish = 3, kHardsigmoid = 4 };

// Where results go: float32, int8 codes, or both; null is nowhere. Floats are [batch, out_pixels, channels].
struct ConvResults {
  float* floats;
  int8_t* codes;
  const int8_t* residual;  // codes like the results, to be dequantized and added; may be null
  Requantization requantization;
  int64_t channels;
  int64_t code_stride;           // codes from one pixel to the next; more than `channels` inside a concatenation
  const float* added = nullptr;  // floats like `floats`, and not the same memory: tiles may be computed twice
  Activation activation = Activation::kNone;
  float low = 0.0f, high = 0.0f;
};

struct ConvKernels {
  // max |x|, NaN ignored.
  float (*largest_magnitude)(const void* x, FloatType type, int64_t count);
  // Codes [pixels, channels] of one sample, pixels [begin, end): clamp(round(x * (1/scale)), lowest - zero_point,
  // highest
  // - zero_point) + zero_point, NaN -> zero_point. x is [pixels, channels] or, `channels_first`, [channels, pixels].
  void (*quantize_pixels)(const void* x, FloatType type, bool channels_first, int64_t channels, int64_t pixels,
                          int64_t begin, int64_t end, float scale, int32_t zero_point, int32_t lowest, int8_t* codes);
  // Rows of the product for the output pixels [begin, end) of one sample and group: row 0 of `out` is pixel `begin`.
  // `row` holds row_inputs() bytes, `pixels` taps() * (end - begin) integers. Scales are not touched.
  void (*gather_rows)(const ConvShape& shape, const TileShape& weight, const int8_t* codes, int64_t group,
                      int64_t begin, int64_t end, int8_t* row, int32_t* pixels, const QuantizedRows& out);
  // Results of the pixels [begin, end) from what the products gave, y [end - begin, channels]; y may be where the
  // floats go.
  void (*finish)(const float* y, int64_t begin, int64_t end, const ConvResults& to);
  // sums[i] = sum of the `inputs` codes from i * inputs on.
  void (*sum_pixels)(const int8_t* codes, int64_t count, int64_t inputs, int32_t* sums);
  // Whether multiply_rows reads segments of the codes in place, and whether it needs pixel sums for that.
  bool (*reads_in_place)(const ConvShape& shape);
  bool (*needs_pixel_sums)(const ConvShape& shape, const TiledWeight& w);
  // Results of the output pixels [pixel_begin, pixel_end) of one sample and group in the panels [panel_begin,
  // panel_end), for weights with one scale an output and at most kMaxChunk inputs. `scratch`: rows_scratch_bytes,
  // 64-byte aligned.
  void (*multiply_rows)(const ConvShape& shape, const TiledWeight& w, const ConvInput& x, const ConvResults& y,
                        int64_t sample, int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t panel_begin,
                        int64_t panel_end, const float* bias, void* scratch);
  int64_t panels_per_tile;  // of multiply_rows: split panels in multiples of it
  int64_t (*rows_scratch_bytes)(const ConvShape& shape, const TileShape& weight, int64_t rows);
  // Whether depthwise_lines computes a convolution.
  bool (*is_depthwise)(const ConvShape& shape, const TiledWeight& w);
  // The same for the channels [channel_begin, channel_end) of output lines; channels in multiples of
  // kDepthwiseChannels.
  void (*depthwise_lines)(const ConvShape& shape, const TiledWeight& w, const ConvInput& x, const ConvResults& y,
                          int64_t sample, int64_t channel_begin, int64_t channel_end, int64_t line_begin,
                          int64_t line_end, const float* bias, void* scratch);
  int64_t (*depthwise_scratch_bytes)(const ConvShape& shape, const TileShape& weight);
  // Pixels [begin, end) of y [pixels, channels] as [channels, pixels].
  void (*to_channels_first)(const float* y, int64_t channels, int64_t pixels, int64_t begin, int64_t end, float* out);
};

}  // namespace halfbyte
