// conv_int8: activations to channels-last int8 codes (kept as they are if they are such codes already), then integer
// products, in parallel over samples and runs of output pixels.
#include <algorithm>
#include <limits>
#include <vector>

#include "conv_products.h"
#include "halfbyte/conv.h"
#include "local_buffer.h"
#include "product_operands.h"

namespace halfbyte::ops {
namespace {

// Activations as [batch, pixels, channels], or [batch, channels, pixels] if channels_first.
struct Activations {
  Tensor tensor;
  bool channels_first;
};

Tensor move_dim(Tensor x, int64_t from, int64_t to) {
  for (; from < to; ++from) x = torch::stable::transpose(x, from, from + 1);
  for (; from > to; --from) x = torch::stable::transpose(x, from, from - 1);
  return x;
}

// int8 codes as a contiguous [N, ..., C].
Tensor codes_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(move_dim(x, 1, x.dim() - 1));
}

int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation,
                    int64_t output_padding, bool transposed) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  if (transposed) return (in - 1) * stride - before - after + reach + output_padding;
  const int64_t room = in + before + after - reach;
  return room < 0 ? 0 : room / stride + 1;
}

void check_sizes(const std::vector<int64_t>& values, size_t count, int64_t least, const char* name) {
  check(values.size() == count, name, " has ", values.size(), " values, not ", count);
  for (int64_t value : values) check(value >= least && value < (1 << 24), name, " holds ", value, ", out of range");
}

struct Conv {
  ConvShape shape;
  WeightOperand operand;
  std::vector<int64_t> y_sizes;
};

Conv checked(const Tensor& x, const Tensor& qweight, const Tensor& scale, const OptionalTensor& zero_point,
             const OptionalTensor& bias, int64_t bits, int64_t out_channels, int64_t group_size,
             const ConvGeometry& geometry) {
  check(x.dim() >= 3 && x.dim() <= 5, "x must have 3 to 5 dimensions, [N, C, ...]");
  const auto dims = static_cast<size_t>(x.dim() - 2);
  check_sizes(geometry.kernel_size, dims, 1, "kernel_size");
  check_sizes(geometry.stride, dims, 1, "stride");
  check_sizes(geometry.padding, 2 * dims, 0, "padding");
  check_sizes(geometry.dilation, dims, 1, "dilation");
  check_sizes(geometry.output_padding, dims, 0, "output_padding");
  check(bits >= 1 && bits <= 8, "bits=", bits, " is not in 1..8");
  const int64_t groups = geometry.groups;
  check(groups >= 1 && out_channels >= 0 && group_size >= 1, "groups=", groups, ", out_channels=", out_channels,
        " or group_size=", group_size, " is out of range");
  check(x.size(1) % groups == 0 && out_channels % groups == 0, "groups=", groups, " does not divide ", x.size(1),
        " input and ", out_channels, " output channels");
  ConvShape s = {.batch = x.size(0),
                 .in_channels = x.size(1),
                 .out_channels = out_channels,
                 .groups = groups,
                 .in = {1, 1, 1},
                 .out = {1, 1, 1},
                 .kernel = {1, 1, 1},
                 .stride = {1, 1, 1},
                 .padding = {0, 0, 0},
                 .dilation = {1, 1, 1},
                 .transposed = geometry.transposed};
  std::vector<int64_t> y_sizes = {s.batch, out_channels};
  for (size_t d = 0; d < dims; ++d) {
    const size_t at = 3 - dims + d;
    s.in[at] = x.size(static_cast<int64_t>(d) + 2);
    s.kernel[at] = geometry.kernel_size[d];
    s.stride[at] = geometry.stride[d];
    s.padding[at] = geometry.padding[d];
    s.dilation[at] = geometry.dilation[d];
    s.out[at] = output_size(s.in[at], s.kernel[at], s.stride[at], s.padding[at], geometry.padding[dims + d],
                            s.dilation[at], geometry.output_padding[d], s.transposed);
    check(s.in[at] == 0 || s.out[at] > 0, "the kernel does not fit in the padded input of size ", s.in[at]);
    y_sizes.push_back(std::max<int64_t>(s.out[at], 0));
  }
  constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max();
  check(s.in_pixels() <= kMostPixels && s.out_pixels() <= kMostPixels, "a sample has more than 2^31 pixels");
  const TileShape weight = {.out_features = out_channels,
                            .in_features = s.row_inputs(),
                            .group_size = group_size,
                            .bits = static_cast<int>(bits)};
  check(weight.in_features % group_size == 0, "group_size=", group_size, " does not divide the ", weight.in_features,
        " inputs of an output");
  return {s, checked_weight(weight, qweight, scale, zero_point, bias), std::move(y_sizes)};
}

// Dynamic scales: symmetric, one for each sample, max(absmax / 127, FLT_MIN).
void find_scales(const Activations& x, FloatType type, const ConvShape& s, float* scale) {
  const int64_t count = s.in_channels * s.in_pixels(), size = type == FloatType::kFloat32 ? 4 : 2;
  const int64_t chunks = std::max<int64_t>(ceil_div(count, kElementGrain), 1);
  std::vector<float> largest(static_cast<size_t>(s.batch * chunks));
  const auto* data = static_cast<const std::byte*>(x.tensor.const_data_ptr());
  parallel_for(s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task % chunks * kElementGrain, length = std::min(kElementGrain, count - at);
      largest[static_cast<size_t>(task)] =
          kernels().conv.largest_magnitude(data + (task / chunks * count + at) * size, type, length);
    }
  });
  for (int64_t n = 0; n < s.batch; ++n) {
    const auto first = largest.begin() + n * chunks;
    scale[n] = std::max(*std::max_element(first, first + chunks) / 127.0f, FLT_MIN);
  }
}

void quantize_activations(const Activations& x, FloatType type, const ConvShape& s, bool dynamic, const ConvInput& to,
                          int8_t* codes) {
  const int64_t pixels = s.in_pixels(), sample = s.in_channels * pixels, size = type == FloatType::kFloat32 ? 4 : 2;
  const int64_t step = round_up(std::max<int64_t>(kElementGrain / std::max<int64_t>(s.in_channels, 1), 1), 16);
  const int64_t steps = ceil_div(pixels, step);
  const auto* data = static_cast<const std::byte*>(x.tensor.const_data_ptr());
  parallel_for(s.batch * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / steps, at = task % steps * step;
      kernels().conv.quantize_pixels(data + n * sample * size, type, x.channels_first, s.in_channels, pixels, at,
                                     std::min(at + step, pixels), to.scale[n], to.zero_point, dynamic ? -127 : -128,
                                     codes + n * sample);
    }
  });
}

// Channels-last floats to y in its dtype and layout.
void store_floats(const float* floats, const ConvShape& s, bool channels_first, FloatType type, const Tensor& y,
                  float* turned) {
  const int64_t pixels = s.out_pixels(), sample = pixels * s.out_channels;
  if (channels_first) {
    float* to = type == FloatType::kFloat32 ? static_cast<float*>(y.mutable_data_ptr()) : turned;
    const int64_t step = round_up(std::max<int64_t>(kElementGrain / s.out_channels, 1), 16);
    const int64_t steps = ceil_div(pixels, step);
    parallel_for(s.batch * steps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / steps, at = task % steps * step;
        kernels().conv.to_channels_first(floats + n * sample, s.out_channels, pixels, at, std::min(at + step, pixels),
                                         to + n * sample);
      }
    });
    floats = to;
  }
  if (type == FloatType::kFloat32) return;
  auto* half = static_cast<uint16_t*>(y.mutable_data_ptr());
  parallel_for(s.batch * sample, kElementGrain, [&](int64_t begin, int64_t end) {
    kernels().elementwise.from_float(floats + begin, type, half + begin, end - begin);
  });
}

}  // namespace

Tensor conv_int8(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias, int64_t bits,
                 int64_t out_channels, int64_t group_size, std::vector<int64_t> kernel_size,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                 std::vector<int64_t> output_padding, int64_t groups, bool transposed, OptionalTensor act_scale,
                 OptionalTensor act_zero_point, OptionalTensor out_scale, OptionalTensor out_zero_point,
                 int64_t out_min, int64_t out_max, OptionalTensor residual, OptionalTensor residual_scale,
                 OptionalTensor residual_zero_point) {
  const bool codes_in = x.scalar_type() == ScalarType::Char, codes_out = out_scale.has_value();
  const TensorQparams act = tensor_qparams(act_scale, act_zero_point, "act_scale", "act_zero_point");
  const TensorQparams out = tensor_qparams(out_scale, out_zero_point, "out_scale", "out_zero_point");
  const TensorQparams added =
      tensor_qparams(residual_scale, residual_zero_point, "residual_scale", "residual_zero_point");
  check(!codes_in || act_scale.has_value(), "x holds int8 codes, which need act_scale");
  check(out_min >= -128 && out_min <= out_max && out_max <= 127, "out_min=", out_min, ", out_max=", out_max,
        " is not a range of int8 codes");
  const Conv c = checked(x, qweight, scale, zero_point, bias, bits, out_channels, group_size,
                         {std::move(kernel_size), std::move(stride), std::move(padding), std::move(dilation),
                          std::move(output_padding), groups, transposed});
  const ConvShape& s = c.shape;
  check(residual.has_value() == residual_scale.has_value() && (codes_out || !residual),
        "residual, residual_scale and out_scale go together");
  if (residual) {
    check_type(*residual, ScalarType::Char, "residual");
    bool equal = residual->dim() == static_cast<int64_t>(c.y_sizes.size());
    for (size_t d = 0; equal && d < c.y_sizes.size(); ++d) {
      equal = residual->size(static_cast<int64_t>(d)) == c.y_sizes[d];
    }
    check(equal, "residual does not have the shape of the result");
  }

  const bool channels_first = x.is_contiguous() || !is_channels_last(x);
  std::vector<int64_t> last_sizes = c.y_sizes;
  std::rotate(last_sizes.begin() + 1, last_sizes.begin() + 2, last_sizes.end());
  const ScalarType y_type = codes_out ? ScalarType::Char : codes_in ? ScalarType::Float : x.scalar_type();
  const Tensor y_last = new_tensor(last_sizes, y_type);  // [N, ..., O]
  Tensor y = channels_first && !codes_out ? new_tensor(c.y_sizes, y_type) : move_dim(y_last, x.dim() - 1, 1);
  if (y.numel() == 0) return y;

  const bool turned = channels_first && !codes_out && s.out_channels > 1 && s.out_pixels() > 1;
  const FloatType type = codes_in ? FloatType::kFloat32 : float_type(x, "x");
  const bool direct = codes_out || (!turned && type == FloatType::kFloat32);
  const int64_t results = s.batch * s.out_pixels() * s.out_channels;
  const TiledWeight& w = c.operand.weight;
  Parts parts;
  const int64_t sums_at = parts.add<int32_t>(needs_pixel_sums(s, w) ? s.batch * s.in_pixels() * s.groups : 0);
  const int64_t codes_at = parts.add<int8_t>(codes_in ? 0 : s.batch * s.in_pixels() * s.in_channels);
  const int64_t scales_at = parts.add<float>(s.batch);
  const int64_t floats_at = parts.add<float>(direct ? 0 : results);
  const int64_t turned_at = parts.add<float>(turned && type != FloatType::kFloat32 ? results : 0);
  std::byte* memory = call_buffer().get(parts.bytes());

  const Tensor x_codes = codes_in ? codes_last(x) : x;
  auto* scales = reinterpret_cast<float*>(memory + scales_at);
  std::fill_n(scales, s.batch, act.scale);
  ConvInput codes = {codes_in ? static_cast<const int8_t*>(x_codes.const_data_ptr())
                              : reinterpret_cast<const int8_t*>(memory + codes_at),
                     scales, act.zero_point, nullptr};
  if (!codes_in) {
    const Activations floats = {channels_first ? as_contiguous(x) : x, channels_first};
    if (!act_scale) find_scales(floats, type, s, scales);
    quantize_activations(floats, type, s, !act_scale, codes, reinterpret_cast<int8_t*>(memory + codes_at));
  }

  const Tensor residual_codes = residual ? codes_last(*residual) : y;
  ConvResults to = {};
  to.channels = to.code_stride = s.out_channels;
  if (codes_out) {
    to.codes = static_cast<int8_t*>(y_last.mutable_data_ptr());
    to.residual = residual ? static_cast<const int8_t*>(residual_codes.const_data_ptr()) : nullptr;
    to.requantization = {.inverse_scale = 1.0f / out.scale,
                         .zero_point = out.zero_point,
                         .lowest = static_cast<int32_t>(out_min),
                         .highest = static_cast<int32_t>(out_max),
                         .residual_scale = added.scale,
                         .residual_zero_point = added.zero_point};
  } else {
    to.floats = direct ? static_cast<float*>(y.mutable_data_ptr()) : reinterpret_cast<float*>(memory + floats_at);
  }
  const FloatBias float_bias(c.operand.bias);
  multiply_conv(s, w, codes, float_bias.get(), to, reinterpret_cast<int32_t*>(memory + sums_at));
  if (!direct) {
    store_floats(to.floats, s, turned, type, y, reinterpret_cast<float*>(memory + turned_at));
  }
  call_buffer().release_if_large();
  return y;
}

}  // namespace halfbyte::ops
