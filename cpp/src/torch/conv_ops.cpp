// conv_int8: activations to channels-last int8 codes (kept as they are if they are such codes already), then integer
// products, in parallel over samples and runs of output pixels.
#include <algorithm>
#include <limits>
#include <vector>

#include "halfbyte/conv.h"
#include "local_buffer.h"
#include "product_operands.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kElementGrain = 1 << 15;     // activations that a thread takes at least
constexpr int64_t kGatherBytes = 128 << 10;    // gathered rows that one product reads
constexpr int64_t kMaxRows = 384;              // of one product
constexpr int64_t kLeastRows = 24;             // that share a pass over the weights
constexpr int64_t kSegments = 2048;            // pointers of one run
constexpr int64_t kMinTaskProducts = 1 << 19;  // less work than this is not worth another thread

// Activations as [batch, pixels, channels], or [batch, channels, pixels] if channels_first.
struct Activations {
  Tensor tensor;
  bool channels_first;
};

// Whether the memory of x [N, C, ...] is that of a contiguous [N, ..., C]. Strides of single elements do not matter.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto fits = [&](int64_t dim) {
    const bool fit = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fit;
  };
  if (!fits(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (!fits(dim)) return false;
  }
  return fits(0);
}

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

// Tasks of about equal size for all threads; results of tiny convolutions are worth one thread only.
int64_t tasks_for(int64_t products) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(products / kMinTaskProducts, 1, threads);
}

// Depthwise convolutions: samples x runs of lines.
void multiply_depthwise(const Conv& c, const ConvInput& x, const float* bias, const ConvResults& y) {
  const ConvShape& s = c.shape;
  const TiledWeight& w = c.operand.weight;
  const int64_t lines = s.out[1], blocks = ceil_div(s.out_channels, kDepthwiseChannels);
  const int64_t tasks = tasks_for(8 * s.batch * s.out_pixels() * s.out_channels * s.taps());
  const int64_t of_sample = std::min(ceil_div(tasks, s.batch), lines * blocks);
  // Lines are split first: neighbours share what they read.
  const int64_t runs = std::min(of_sample, lines), parts = std::min(ceil_div(of_sample, runs), blocks);
  parallel_for(s.batch * runs * parts, ceil_div(s.batch * runs * parts, tasks), [&](int64_t begin, int64_t end) {
    thread_local LocalBuffer buffer;
    void* memory = buffer.get(kernels().conv.depthwise_scratch_bytes(s, w.shape));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (runs * parts), run = task / parts % runs, part = task % parts;
      kernels().conv.depthwise_lines(s, w, x, y, n, part * blocks / parts * kDepthwiseChannels,
                                     std::min((part + 1) * blocks / parts * kDepthwiseChannels, s.out_channels),
                                     run * lines / runs, (run + 1) * lines / runs, bias, memory);
    }
    buffer.release_if_large();
  });
}

// Products of rows read in place: samples x groups x runs of pixels, and of panels where pixels are few.
void multiply_rows(const Conv& c, const ConvInput& x, const float* bias, const ConvResults& y) {
  const ConvShape& s = c.shape;
  const TiledWeight& w = c.operand.weight;
  const ConvKernels& kernel = kernels().conv;
  const int64_t pixels = s.out_pixels(), outputs = s.group_outputs();
  const int64_t tasks = tasks_for(s.batch * pixels * s.out_channels * s.row_inputs());
  // The pointers of a run stay in the L1 cache, gathered rows in the L2 cache.
  const int64_t most = kernel.reads_in_place(s) ? kSegments / s.taps() : kGatherBytes / s.row_inputs();
  const int64_t fair = ceil_div(s.batch * s.groups * pixels, tasks);
  const int64_t runs = ceil_div(pixels, std::max<int64_t>(std::min(most, fair), kLeastRows));
  const int64_t panels = ceil_div(outputs, kPanel);  // a group may touch one more, at either end
  const int64_t parts =
      std::clamp<int64_t>(tasks / (s.batch * s.groups * runs), 1, ceil_div(panels, kernel.panels_per_tile));
  const int64_t count = s.batch * s.groups * runs * parts;
  parallel_for(count, ceil_div(count, tasks), [&](int64_t begin, int64_t end) {
    thread_local LocalBuffer buffer;
    void* memory = buffer.get(kernel.rows_scratch_bytes(s, w.shape, ceil_div(pixels, runs)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, run = task / parts % runs, group = task / parts / runs % s.groups;
      const int64_t first = group * outputs / kPanel, last = ceil_div((group + 1) * outputs, kPanel);
      const int64_t tile = kernel.panels_per_tile, tiles = ceil_div(last - first, tile);
      kernel.multiply_rows(s, w, x, y, task / parts / runs / s.groups, group, run * pixels / runs,
                           (run + 1) * pixels / runs, first + part * tiles / parts * tile,
                           std::min(first + (part + 1) * tiles / parts * tile, last), bias, memory);
    }
    buffer.release_if_large();
  });
}

void sum_all_pixels(const ConvShape& s, const ConvInput& x, int32_t* sums) {
  const int64_t inputs = s.group_inputs(), count = s.batch * s.in_pixels() * s.groups;
  parallel_for(count, kElementGrain / inputs, [&](int64_t begin, int64_t end) {
    kernels().conv.sum_pixels(x.codes + begin * inputs, end - begin, inputs, sums + begin);
  });
}

// The most general form, for weights whose inputs have scales in groups or are very many: rows that are gathered from
// the codes, one group of channels after another.
void multiply_gathered(const Conv& c, const ConvInput& x, const float* bias, const ConvResults& y) {
  const ConvShape& s = c.shape;
  const TiledWeight& w = c.operand.weight;
  const ConvKernels& kernel = kernels().conv;
  const int64_t pixels = s.out_pixels(), outputs = s.group_outputs();
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t fair = ceil_div(s.batch * pixels, 4 * threads);
  const int64_t most = std::clamp<int64_t>(kGatherBytes / code_stride(w.shape), 16, kMaxRows);
  const int64_t step = std::clamp<int64_t>(std::min(most, fair), 1, pixels), steps = ceil_div(pixels, step);
  // Panels of one group may hold outputs of its neighbours too, which are computed and dropped.
  const int64_t width = (ceil_div(outputs, kPanel) + 1) * kPanel;
  parallel_for(s.batch * steps, 1, [&](int64_t begin, int64_t end) {
    Parts parts;
    const int64_t codes_at = parts.add<int8_t>(step * code_stride(w.shape));
    const int64_t scales_at = parts.add<float>(step);
    const int64_t sums_at = parts.add<int32_t>(step * w.shape.groups() * chunks_per_group(w.shape));
    const int64_t row_at = parts.add<int8_t>(s.row_inputs());
    const int64_t pixels_at = parts.add<int32_t>(step * s.taps());
    const int64_t y_at = parts.add<float>(step * width);
    const int64_t wide_at = parts.add<float>(y.codes == nullptr ? 0 : step * s.out_channels);
    const int64_t scratch_at = parts.add<std::byte>(kernels().matmul.scratch_bytes(w.shape));
    thread_local LocalBuffer buffer;
    std::byte* memory = buffer.get(parts.bytes());
    const QuantizedRows rows = {.codes = reinterpret_cast<int8_t*>(memory + codes_at),
                                .scale = reinterpret_cast<float*>(memory + scales_at),
                                .chunk_sum = reinterpret_cast<int32_t*>(memory + sums_at),
                                .zero_point = x.zero_point};
    auto* product = reinterpret_cast<float*>(memory + y_at);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / steps, first = task % steps * step, last = std::min(first + step, pixels);
      float* floats = y.codes == nullptr ? y.floats + (n * pixels + first) * s.out_channels
                                         : reinterpret_cast<float*>(memory + wide_at);
      std::fill_n(rows.scale, last - first, x.scale[n]);
      for (int64_t group = 0; group < s.groups; ++group) {
        kernel.gather_rows(s, w.shape, x.codes + n * s.in_pixels() * s.in_channels, group, first, last,
                           reinterpret_cast<int8_t*>(memory + row_at), reinterpret_cast<int32_t*>(memory + pixels_at),
                           rows);
        const int64_t output = group * outputs, panel = output / kPanel;
        const int64_t panel_end = ceil_div(output + outputs, kPanel);
        kernels().matmul.matmul_int8(w, rows, 0, last - first, panel, panel_end, bias, product - panel * kPanel, width,
                                     memory + scratch_at);
        for (int64_t r = 0; r < last - first; ++r) {
          std::copy_n(product + r * width + output - panel * kPanel, outputs, floats + r * s.out_channels + output);
        }
      }
      if (y.codes != nullptr) {
        const int64_t at = (n * pixels + first) * s.out_channels;
        kernel.requantize(floats, (last - first) * s.out_channels, y.residual == nullptr ? nullptr : y.residual + at,
                          y.requantization, y.codes + at);
      }
    }
    buffer.release_if_large();
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
  const Tensor y_last = new_tensor(x, last_sizes, y_type);  // [N, ..., O]
  Tensor y = channels_first && !codes_out ? new_tensor(x, c.y_sizes, y_type) : move_dim(y_last, x.dim() - 1, 1);
  if (y.numel() == 0) return y;

  const bool turned = channels_first && !codes_out && s.out_channels > 1 && s.out_pixels() > 1;
  const FloatType type = codes_in ? FloatType::kFloat32 : float_type(x, "x");
  const bool direct = codes_out || (!turned && type == FloatType::kFloat32);
  const int64_t results = s.batch * s.out_pixels() * s.out_channels;
  const TiledWeight& w = c.operand.weight;
  const bool depthwise = kernels().conv.is_depthwise(s, w);
  const bool one_scale = w.shape.groups() == 1 && w.shape.in_features <= kMaxChunk;
  const bool in_place = !depthwise && one_scale && kernels().conv.reads_in_place(s);
  Parts parts;
  const int64_t sums_at = parts.add<int32_t>(in_place ? s.batch * s.in_pixels() * s.groups : 0);
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
  to.channels = s.out_channels;
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
  if (depthwise) {
    multiply_depthwise(c, codes, float_bias.get(), to);
  } else if (one_scale) {
    if (in_place) {
      auto* sums = reinterpret_cast<int32_t*>(memory + sums_at);
      sum_all_pixels(s, codes, sums);
      codes.pixel_sum = sums;
    }
    multiply_rows(c, codes, float_bias.get(), to);
  } else {
    multiply_gathered(c, codes, float_bias.get(), to);
  }
  if (!direct) {
    store_floats(to.floats, s, turned, type, y, reinterpret_cast<float*>(memory + turned_at));
  }
  call_buffer().release_if_large();
  return y;
}

}  // namespace halfbyte::ops
