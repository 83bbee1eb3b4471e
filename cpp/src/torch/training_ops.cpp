// fake_quantize_learned, fake_quantize_codebook and their gradients: checks, zero points as integers, fixed blocks over
// threads, sums in float64.
#include <algorithm>
#include <cmath>
#include <vector>

#include "granularity.h"
#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kGrain = 1 << 15;       // elements a thread takes at least
constexpr int64_t kStrip = 1024;          // columns whose qparams and sums stay in the first-level cache
constexpr int64_t kMinColumns = 64;       // narrower matrices are read as fewer, wider rows
constexpr int64_t kNarrowColumns = 1024;  // up to here, rows are joined until they fill whole vectors

// The zero points that are used: rounded half to even, then clamped to the range of codes.
Tensor rounded_zero_point(const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  check_type(zero_point, ScalarType::Float, "zero_point");
  check(qmin <= qmax && qmin >= -kMaxCode && qmax <= kMaxCode, "qmin=", qmin, " and qmax=", qmax,
        " are not a range inside [-", kMaxCode, ", ", kMaxCode, "]");
  const Tensor values = as_contiguous(zero_point);
  Tensor rounded = new_tensor(values.sizes(), ScalarType::Int);
  const auto* in = static_cast<const float*>(values.const_data_ptr());
  auto* out = static_cast<int32_t*>(rounded.mutable_data_ptr());
  for (int64_t c = 0; c < values.numel(); ++c) {
    check(!std::isnan(in[c]), "zero_point is NaN at position ", c);
    out[c] =
        static_cast<int32_t>(std::clamp(std::nearbyint(in[c]), static_cast<float>(qmin), static_cast<float>(qmax)));
  }
  return rounded;
}

// Where the kernels read and write.
struct Gradients {
  const void* x;
  const void* grad;
  void* grad_x;
  FloatType type;
  int64_t count;
  Estimator estimator;
};

// The sums of each channel, in float64.
struct ChannelSums {
  explicit ChannelSums(int64_t channels)
      : scale(static_cast<size_t>(channels)), zero_point(static_cast<size_t>(channels)) {}
  std::vector<double> scale, zero_point;
};

// Adds up, for each channel, the partial sums at `part(channel, k)`, k = 0 .. parts - 1, in this order.
template <class Part>
ChannelSums fold(const std::vector<float>& scale, const std::vector<float>& zero_point, int64_t channels, int64_t parts,
                 Part part) {
  ChannelSums sums(channels);
  parallel_for(channels, kGrain / std::max<int64_t>(parts, 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double scale_sum = 0, zero_point_sum = 0;
      for (int64_t k = 0; k < parts; ++k) {
        const auto at = static_cast<size_t>(part(c, k));
        scale_sum += static_cast<double>(scale[at]);
        zero_point_sum += static_cast<double>(zero_point[at]);
      }
      sums.scale[static_cast<size_t>(c)] = scale_sum;
      sums.zero_point[static_cast<size_t>(c)] = zero_point_sum;
    }
  });
  return sums;
}

ChannelSums gradients_by_runs(const Gradients& tensors, const AffineGrid& grid) {
  const int64_t blocks = ceil_div(grid.run_length, kGradientBlock);  // of one run
  const int64_t runs = tensors.count / grid.run_length;
  std::vector<float> scale(static_cast<size_t>(runs * blocks)), zero_point(scale.size());
  const GradientSums sums = {scale.data(), zero_point.data()};
  const auto kernel = kernels().training.learned_gradient_runs;
  parallel_for(runs * blocks, kGrain / std::min(kGradientBlock, grid.run_length), [&](int64_t begin, int64_t end) {
    kernel(tensors.x, tensors.grad, tensors.grad_x, tensors.type, grid, tensors.estimator, begin, end, sums);
  });
  return fold(scale, zero_point, grid.channels, runs / grid.channels * blocks,
              [&](int64_t channel, int64_t k) { return (k / blocks * grid.channels + channel) * blocks + k % blocks; });
}

// Short runs: the tensor as rows of channels * run_length columns, several such rows in one if they are narrow.
ChannelSums gradients_by_columns(const Gradients& tensors, const AffineGrid& grid) {
  const int64_t period = grid.channels * grid.run_length;
  int64_t repeats = 1;
  while (period <= kNarrowColumns && (repeats * period < kMinColumns || repeats * period % kElementLanes != 0)) {
    ++repeats;
  }
  const int64_t columns = period * repeats, stride = round_up(columns, kElementLanes) + kElementLanes;
  std::vector<float> inverse_scale(static_cast<size_t>(stride)), lowest(inverse_scale), highest(inverse_scale);
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t channel = column % period / grid.run_length;
    const auto at = static_cast<size_t>(column);
    inverse_scale[at] = 1.f / grid.scale[channel];
    lowest[at] = static_cast<float>(grid.qmin - grid.zero_point[channel]);
    highest[at] = static_cast<float>(grid.qmax - grid.zero_point[channel]);
  }
  const ColumnGrid column_grid = {inverse_scale.data(), lowest.data(), highest.data()};
  const int64_t rows = ceil_div(tensors.count, columns);
  const int64_t row_blocks = ceil_div(rows, kGradientRows), strips = ceil_div(columns, kStrip);
  std::vector<float> scale(static_cast<size_t>(row_blocks * stride)), zero_point(scale.size());
  const auto kernel = kernels().training.learned_gradient_columns;
  const int64_t item = std::min(rows, kGradientRows) * std::min(columns, kStrip);
  parallel_for(row_blocks * strips, kGrain / item, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / strips, row = block * kGradientRows, column = i % strips * kStrip;
      kernel(tensors.x, tensors.grad, tensors.grad_x, tensors.type, column_grid, tensors.estimator, tensors.count,
             columns, row, std::min(rows, row + kGradientRows), column, std::min(columns, column + kStrip),
             {scale.data() + block * stride, zero_point.data() + block * stride});
    }
  });
  const int64_t parts = repeats * grid.run_length;  // of one block of rows
  return fold(scale, zero_point, grid.channels, row_blocks * parts, [&](int64_t channel, int64_t k) {
    const int64_t in_row = k % parts;
    return k / parts * stride + in_row / grid.run_length * period + channel * grid.run_length +
           in_row % grid.run_length;
  });
}

// What the codebook kernels read, and what backs it.
class CodebookOperands {
 public:
  CodebookOperands(const Tensor& x, const Tensor& scale, const Tensor& values, int64_t group_size, bool binary,
                   double clip_low, double clip_high)
      : scale_(as_contiguous(scale)), values_(as_contiguous(values)), runs_(runs_of(x, {}, group_size).channels) {
    check_type(scale, ScalarType::Float, "scale");
    check_type(values, ScalarType::Float, "values");
    check(scale.numel() == runs_, "scale has ", scale.numel(), " elements; ", runs_, " are needed");
    check(values.numel() >= 2 && values.numel() <= kCodebookEntries, "values has ", values.numel(),
          " entries, not 2 to ", kCodebookEntries);
    grid_ = {.scale = static_cast<const float*>(scale_.const_data_ptr()),
             .values = static_cast<const float*>(values_.const_data_ptr()),
             .entries = static_cast<int>(values.numel()),
             .binary = binary,
             .clip_low = static_cast<float>(clip_low),
             .clip_high = static_cast<float>(clip_high),
             .run_length = group_size};
  }
  const CodebookGrid& grid() const { return grid_; }
  int64_t runs() const { return runs_; }

 private:
  Tensor scale_, values_;
  int64_t runs_;
  CodebookGrid grid_;
};

}  // namespace

Tensor fake_quantize_learned(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                             OptionalInt group_size, int64_t, double) {
  return fake_quantize(x, scale, rounded_zero_point(zero_point, qmin, qmax), qmin, qmax, axis, group_size);
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Tensor zero_point, int64_t qmin, int64_t qmax,
                                                                  OptionalInt axis, OptionalInt group_size,
                                                                  int64_t estimator, double grad_factor) {
  const FloatType type = float_type(x, "x");
  check_type(grad, x.scalar_type(), "grad");
  check_type(scale, ScalarType::Float, "scale");
  check(estimator >= 0 && estimator <= static_cast<int64_t>(Estimator::kPact), "estimator=", estimator, " is unknown");
  check(grad.numel() == x.numel(), "grad has ", grad.numel(), " elements, x has ", x.numel());
  const Runs runs = runs_of(x, axis, group_size);
  check(scale.numel() == runs.channels && zero_point.numel() == runs.channels, "scale has ", scale.numel(),
        " and zero_point ", zero_point.numel(), " elements; ", runs.channels, " are needed");
  const Tensor input = as_contiguous(x), upstream = as_contiguous(grad), scales = as_contiguous(scale);
  const Tensor zero_points = rounded_zero_point(zero_point, qmin, qmax);
  Tensor grad_x = new_tensor(input.sizes(), input.scalar_type());
  Tensor grad_scale = new_tensor(scale.sizes(), ScalarType::Float);
  Tensor grad_zero_point = new_tensor(zero_point.sizes(), ScalarType::Float);
  const AffineGrid grid = {.scale = static_cast<const float*>(scales.const_data_ptr()),
                           .zero_point = static_cast<const int32_t*>(zero_points.const_data_ptr()),
                           .channels = runs.channels,
                           .run_length = runs.run_length,
                           .qmin = static_cast<int32_t>(qmin),
                           .qmax = static_cast<int32_t>(qmax),
                           .inverse_scale = nullptr};
  const Gradients tensors = {input.const_data_ptr(), upstream.const_data_ptr(),        grad_x.mutable_data_ptr(), type,
                             input.numel(),          static_cast<Estimator>(estimator)};
  const bool columns = axis && runs.run_length < kShortRun;
  const ChannelSums sums = tensors.count == 0 ? ChannelSums(runs.channels)
                           : columns          ? gradients_by_columns(tensors, grid)
                                              : gradients_by_runs(tensors, grid);
  auto* scale_out = static_cast<float*>(grad_scale.mutable_data_ptr());
  auto* zero_point_out = static_cast<float*>(grad_zero_point.mutable_data_ptr());
  for (int64_t c = 0; c < runs.channels; ++c) {
    const auto at = static_cast<size_t>(c);
    scale_out[c] = static_cast<float>(grad_factor * sums.scale[at]);
    zero_point_out[c] = static_cast<float>(-grad_factor * static_cast<double>(grid.scale[c]) * sums.zero_point[at]);
  }
  return {grad_x, grad_scale, grad_zero_point};
}

Tensor fake_quantize_codebook(Tensor x, Tensor scale, Tensor values, int64_t group_size, bool binary, double clip_low,
                              double clip_high, double) {
  const FloatType type = float_type(x, "x");
  const CodebookOperands operands(x, scale, values, group_size, binary, clip_low, clip_high);
  const Tensor input = as_contiguous(x);
  Tensor y = new_tensor(input.sizes(), input.scalar_type());
  const void* in = input.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const auto kernel = kernels().training.codebook_fake_quantize;
  parallel_for(operands.runs(), kGrain / group_size,
               [&](int64_t begin, int64_t end) { kernel(in, out, type, operands.grid(), begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_codebook_backward(Tensor grad, Tensor x, Tensor scale, Tensor values,
                                                           int64_t group_size, bool binary, double clip_low,
                                                           double clip_high, double grad_factor) {
  const FloatType type = float_type(x, "x");
  check_type(grad, x.scalar_type(), "grad");
  check(grad.numel() == x.numel(), "grad has ", grad.numel(), " elements, x has ", x.numel());
  const CodebookOperands operands(x, scale, values, group_size, binary, clip_low, clip_high);
  const Tensor input = as_contiguous(x), upstream = as_contiguous(grad);
  Tensor grad_x = new_tensor(input.sizes(), input.scalar_type());
  Tensor grad_scale = new_tensor(scale.sizes(), ScalarType::Float);
  const void* in = input.const_data_ptr();
  const void* gradient = upstream.const_data_ptr();
  void* out = grad_x.mutable_data_ptr();
  auto* scale_out = static_cast<float*>(grad_scale.mutable_data_ptr());
  const int64_t blocks = ceil_div(group_size, kGradientBlock);  // of one run
  std::vector<float> sums(static_cast<size_t>(operands.runs() * blocks));
  const auto kernel = kernels().training.codebook_gradient;
  parallel_for(
      operands.runs() * blocks, kGrain / std::min(kGradientBlock, group_size),
      [&](int64_t begin, int64_t end) { kernel(in, gradient, out, type, operands.grid(), begin, end, sums.data()); });
  for (int64_t run = 0; run < operands.runs(); ++run) {
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += static_cast<double>(sums[static_cast<size_t>(run * blocks + k)]);
    scale_out[run] = static_cast<float>(grad_factor * total);
  }
  return {grad_x, grad_scale};
}

}  // namespace halfbyte::ops
