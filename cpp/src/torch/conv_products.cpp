// The products of a convolution over codes, in parallel: which of the three ways, and how the work is cut.
#include "conv_products.h"

#include <algorithm>

#include "local_buffer.h"
#include "tensor_checks.h"  // parallel_for

namespace halfbyte::ops {
namespace {

constexpr int64_t kGatherBytes = 128 << 10;    // gathered rows that one product reads
constexpr int64_t kMaxRows = 384;              // of one product
constexpr int64_t kLeastRows = 24;             // that share a pass over the weights
constexpr int64_t kSegments = 2048;            // pointers of one run
constexpr int64_t kMinTaskProducts = 1 << 19;  // less work than this is not worth another thread

// Tasks of about equal size for all threads; results of tiny convolutions are worth one thread only.
int64_t tasks_for(int64_t products) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::clamp<int64_t>(products / kMinTaskProducts, 1, threads);
}

// One scale an output and few enough inputs for one sum.
bool has_one_scale(const TiledWeight& w) { return w.shape.groups() == 1 && w.shape.in_features <= kMaxChunk; }

// Depthwise convolutions: samples x runs of lines.
void multiply_depthwise(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const float* bias,
                        const ConvResults& y) {
  const int64_t lines = s.out[1], blocks = ceil_div(s.out_channels, kDepthwiseChannels);
  const int64_t tasks = tasks_for(8 * s.batch * s.out_pixels() * s.out_channels * s.taps());
  const int64_t of_sample = std::min(ceil_div(tasks, s.batch), lines * blocks);
  // Channels are split first where they keep the threads equally busy: the weights of a block are made ready once a
  // task. Else lines, of which neighbours share what they read.
  const bool by_channels = blocks % of_sample == 0 || blocks >= 4 * of_sample;
  const int64_t runs = by_channels ? 1 : std::min(of_sample, lines),
                parts = std::min(ceil_div(of_sample, runs), blocks);
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
void multiply_rows(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const float* bias,
                   const ConvResults& y) {
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
void multiply_gathered(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const float* bias,
                       const ConvResults& y) {
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
    const int64_t wide_at = parts.add<float>(y.floats != nullptr ? 0 : step * s.out_channels);
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
      float* floats = y.floats != nullptr ? y.floats + (n * pixels + first) * s.out_channels
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
      if (y.codes != nullptr || y.added != nullptr || y.activation != Activation::kNone) {
        kernel.finish(floats, n * pixels + first, n * pixels + last, y);
      }
    }
    buffer.release_if_large();
  });
}

}  // namespace

bool needs_pixel_sums(const ConvShape& s, const TiledWeight& w) {
  return !kernels().conv.is_depthwise(s, w) && has_one_scale(w) && kernels().conv.needs_pixel_sums(s, w);
}

void multiply_conv(const ConvShape& s, const TiledWeight& w, ConvInput x, const float* bias, const ConvResults& y,
                   int32_t* pixel_sums) {
  if (kernels().conv.is_depthwise(s, w)) return multiply_depthwise(s, w, x, bias, y);
  if (!has_one_scale(w)) return multiply_gathered(s, w, x, bias, y);
  if (needs_pixel_sums(s, w)) {
    sum_all_pixels(s, x, pixel_sums);
    x.pixel_sum = pixel_sums;
  }
  multiply_rows(s, w, x, bias, y);
}

}  // namespace halfbyte::ops
