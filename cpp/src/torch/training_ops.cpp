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

// The zero points that are used: rounded half to even and clamped to the range of codes.
Tensor rounded_zero_point(const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  check_type(zero_point, ScalarType::Float, "zero_point");
  check(qmin <= qmax && qmin >= -kMaxCode && qmax <= kMaxCode, "qmin=", qmin, " and qmax=", qmax,
        " are not a range inside [-", kMaxCode, ", ", kMaxCode, "]");
  const Tensor values = as_contiguous(zero_point);
  Tensor rounded = new_tensor(values.sizes(), ScalarType::Int);
  const auto* in = static_cast<const float*>(values.const_data_ptr());
  auto* out = static_cast<int32_t*>(rounded.mutable_data_ptr());
  const auto lowest = static_cast<float>(qmin), highest = static_cast<float>(qmax);
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: sums with it are rounded to integers (xsimd_arch.h)
  const int64_t count = values.numel();
  bool nan = false;
  for (int64_t c = 0; c < count; ++c) {
    const float value = in[c];
    nan |= value != value;
    const float inside = value < lowest ? lowest : value < highest ? value : highest;  // also of NaN
    out[c] = static_cast<int32_t>((inside + kMagic) - kMagic);
  }
  if (nan) {
    const auto* at = std::find_if(in, in + count, [](float value) { return std::isnan(value); });
    check(false, "zero_point is NaN at position ", at - in);
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

// The gradients of the qparams.
struct QparamGradients {
  float* scale;
  float* zero_point;
  const float* of_scale;  // the scale itself
  double factor;
  // From the sums over all elements of a channel.
  void store(int64_t channel, double scale_sum, double zero_point_sum) const {
    scale[channel] = static_cast<float>(factor * scale_sum);
    zero_point[channel] = static_cast<float>(-factor * static_cast<double>(of_scale[channel]) * zero_point_sum);
  }
};

void gradients_by_runs(const Gradients& tensors, const AffineGrid& grid, const QparamGradients& out) {
  const int64_t blocks = ceil_div(grid.run_length, kGradientBlock);  // of one run
  const int64_t runs = tensors.count / grid.run_length, grain = kGrain / std::min(kGradientBlock, grid.run_length);
  const auto kernel = kernels().training.learned_gradient_runs;
  const auto run_kernel = [&](int64_t begin, int64_t end, const GradientSums& sums) {
    kernel(tensors.x, tensors.grad, tensors.grad_x, tensors.type, grid, tensors.estimator, begin, end, sums);
  };
  if (blocks == 1 && runs == grid.channels) {  // such as groups: each sum is all there is of its channel
    parallel_for(runs, grain, [&](int64_t begin, int64_t end) {
      run_kernel(begin, end, {out.scale, out.zero_point});
      for (int64_t c = begin; c < end; ++c) {
        out.store(c, static_cast<double>(out.scale[c]), static_cast<double>(out.zero_point[c]));
      }
    });
    return;
  }
  std::vector<float> scale(static_cast<size_t>(runs * blocks)), zero_point(scale.size());
  parallel_for(runs * blocks, grain,
               [&](int64_t begin, int64_t end) { run_kernel(begin, end, {scale.data(), zero_point.data()}); });
  parallel_for(grid.channels, kGrain / (runs / grid.channels * blocks), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double scale_sum = 0, zero_point_sum = 0;
      for (int64_t run = c; run < runs; run += grid.channels) {
        for (int64_t block = run * blocks; block < (run + 1) * blocks; ++block) {
          scale_sum += static_cast<double>(scale[static_cast<size_t>(block)]);
          zero_point_sum += static_cast<double>(zero_point[static_cast<size_t>(block)]);
        }
      }
      out.store(c, scale_sum, zero_point_sum);
    }
  });
}

// Short runs: the tensor as rows of channels * run_length columns, several such rows in one if they are narrow.
void gradients_by_columns(const Gradients& tensors, const AffineGrid& grid, const QparamGradients& out) {
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
  std::vector<double> scale_sums(static_cast<size_t>(columns)), zero_point_sums(scale_sums.size());
  parallel_for(columns, kGrain / row_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      for (int64_t column = begin; column < end; ++column) {
        const auto at = static_cast<size_t>(column), part = static_cast<size_t>(block * stride + column);
        scale_sums[at] += static_cast<double>(scale[part]);
        zero_point_sums[at] += static_cast<double>(zero_point[part]);
      }
    }
  });
  for (int64_t channel = 0; channel < grid.channels; ++channel) {
    double scale_sum = 0, zero_point_sum = 0;
    for (int64_t first = channel * grid.run_length; first < columns; first += period) {
      for (int64_t column = first; column < first + grid.run_length; ++column) {
        scale_sum += scale_sums[static_cast<size_t>(column)];
        zero_point_sum += zero_point_sums[static_cast<size_t>(column)];
      }
    }
    out.store(channel, scale_sum, zero_point_sum);
  }
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
  const QparamGradients of_qparams = {static_cast<float*>(grad_scale.mutable_data_ptr()),
                                      static_cast<float*>(grad_zero_point.mutable_data_ptr()), grid.scale, grad_factor};
  if (tensors.count == 0) {
    for (int64_t c = 0; c < runs.channels; ++c) of_qparams.store(c, 0, 0);
  } else {
    const bool columns = axis && runs.run_length < kShortRun;
    (columns ? gradients_by_columns : gradients_by_runs)(tensors, grid, of_qparams);
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
  std::vector<float> parts(blocks == 1 ? 0 : static_cast<size_t>(operands.runs() * blocks));
  float* sums = blocks == 1 ? scale_out : parts.data();
  const auto kernel = kernels().training.codebook_gradient;
  parallel_for(operands.runs(), kGrain / group_size, [&](int64_t begin, int64_t end) {
    kernel(in, gradient, out, type, operands.grid(), begin * blocks, end * blocks, sums);
    for (int64_t run = begin; run < end; ++run) {
      double total = 0;
      for (int64_t k = 0; k < blocks; ++k) total += static_cast<double>(sums[run * blocks + k]);
      scale_out[run] = static_cast<float>(grad_factor * total);
    }
  });
  return {grad_x, grad_scale};
}

}  // namespace halfbyte::ops
