// fake_quantize, quantize, dequantize, observe_minmax, search_qparams: checks, qparams as the kernels read them,
// threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "granularity.h"
#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements a thread takes at least
constexpr int64_t kMinColumns = 64;  // narrower matrices are read as fewer, wider rows
constexpr int64_t kPiece = 1 << 16;  // longer runs are cut for min/max, so that threads share them

// Qparams in the form that the kernels read, and what backs them.
class Grid {
 public:
  Grid(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
       OptionalInt group_size)
      : scale_(as_contiguous(scale)), zero_point_(as_contiguous(zero_point)) {
    const Runs runs = runs_of(x, axis, group_size);
    check_type(scale, ScalarType::Float, "scale");
    check_type(zero_point, ScalarType::Int, "zero_point");
    check(scale.numel() == runs.channels && zero_point.numel() == runs.channels, "scale has ", scale.numel(),
          " and zero_point ", zero_point.numel(), " elements; ", runs.channels, " are needed");
    check(qmin <= qmax && qmin >= -kMaxCode && qmax <= kMaxCode, "qmin=", qmin, " and qmax=", qmax,
          " are not a range inside [-", kMaxCode, ", ", kMaxCode, "]");
    grid_ = {.scale = static_cast<const float*>(scale_.const_data_ptr()),
             .zero_point = static_cast<const int32_t*>(zero_point_.const_data_ptr()),
             .channels = runs.channels,
             .run_length = runs.run_length,
             .qmin = static_cast<int32_t>(qmin),
             .qmax = static_cast<int32_t>(qmax),
             .inverse_scale = nullptr};
    int32_t largest = 0;
    for (int64_t c = 0; c < runs.channels; ++c) {
      const int32_t zero = grid_.zero_point[c];
      largest |= zero < 0 ? ~zero : zero;  // the highest bit set in any of them
    }
    check(largest < 2 * kMaxZeroPoint, "zero_point lies outside [-", kMaxZeroPoint, ", ", kMaxZeroPoint, "]");
    if (x.numel() > 0 && (runs.run_length == 1 || (axis && runs.run_length < kShortRun))) advance_with_elements();
  }
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  const AffineGrid& get() const { return grid_; }

 private:
  // Repeats each channel's qparams run_length times and the whole until it fills a vector, plus what a vector that
  // begins at the last channel reads (AffineGrid).
  void advance_with_elements() {
    const int64_t period = grid_.channels * grid_.run_length;
    const int64_t channels = round_up(kElementLanes, period);
    const auto size = static_cast<size_t>(channels + kElementLanes - 1);
    scales_.resize(size);
    inverses_.resize(size);
    zero_points_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      const int64_t channel = static_cast<int64_t>(i) % period / grid_.run_length;
      scales_[i] = grid_.scale[channel];
      inverses_[i] = 1.f / grid_.scale[channel];
      zero_points_[i] = grid_.zero_point[channel];
    }
    grid_.scale = scales_.data();
    grid_.inverse_scale = inverses_.data();
    grid_.zero_point = zero_points_.data();
    grid_.channels = channels;
    grid_.run_length = 1;
  }

  Tensor scale_, zero_point_;
  std::vector<float> scales_, inverses_;
  std::vector<int32_t> zero_points_;
  AffineGrid grid_;
};

// f(begin, end) over ranges of elements as the kernels want them.
template <class F>
void over_elements(int64_t count, const F& f) {
  parallel_for(ceil_div(count, kElementBlock), kGrain / kElementBlock,
               [&](int64_t begin, int64_t end) { f(begin * kElementBlock, std::min(end * kElementBlock, count)); });
}

// Runs fake-quantize; writes the mask where there is one.
Tensor fake_quantize_into(const Tensor& x, const Grid& grid, uint8_t* mask) {
  const FloatType type = float_type(x, "x");
  const Tensor input = as_contiguous(x);
  Tensor output = new_tensor(input.sizes(), input.scalar_type());
  const void* in = input.const_data_ptr();
  void* out = output.mutable_data_ptr();
  const auto kernel = kernels().elementwise.fake_quantize;
  over_elements(input.numel(),
                [&](int64_t begin, int64_t end) { kernel(in, out, mask, type, grid.get(), begin, end); });
  return output;
}

CodeType code_type(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Char:
      return CodeType::kInt8;
    case ScalarType::Byte:
      return CodeType::kUInt8;
    default:
      check_type(q, ScalarType::Int, "q");
      return CodeType::kInt32;
  }
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Minima and maxima that partial results are merged into; NaN stays.
struct MinMax {
  explicit MinMax(int64_t count)
      : lo(static_cast<size_t>(count), kInfinity), hi(static_cast<size_t>(count), -kInfinity) {}
  void merge(int64_t i, float low, float high) {
    float& l = lo[static_cast<size_t>(i)];
    float& h = hi[static_cast<size_t>(i)];
    l = low < l || std::isnan(low) ? low : l;
    h = high > h || std::isnan(high) ? high : h;
  }
  std::vector<float> lo, hi;
};

// Each run on its own, long ones in pieces: lo/hi[run % channels].
void observe_runs(const Tensor& x, FloatType type, const Runs& runs, float* lo, float* hi) {
  const auto kernel = kernels().elementwise.minmax_runs;
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  const int64_t count = x.numel() / runs.run_length;
  if (count == runs.channels && runs.run_length <= kPiece) {
    parallel_for(count, kGrain / runs.run_length,
                 [&](int64_t begin, int64_t end) { kernel(in, type, runs.run_length, begin, end, lo, hi); });
    return;
  }
  const int64_t pieces = ceil_div(runs.run_length, kPiece);
  MinMax parts(count * pieces);
  const int64_t bytes = type == FloatType::kFloat32 ? 4 : 2;
  parallel_for(count * pieces, kGrain / std::min(kPiece, runs.run_length), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t offset = item % pieces * kPiece;
      const int64_t length = std::min(kPiece, runs.run_length - offset);
      kernel(in + (item / pieces * runs.run_length + offset) * bytes, type, length, 0, 1, parts.lo.data() + item,
             parts.hi.data() + item);
    }
  });
  MinMax merged(runs.channels);
  for (int64_t item = 0; item < count * pieces; ++item) {
    const auto i = static_cast<size_t>(item);
    merged.merge(item / pieces % runs.channels, parts.lo[i], parts.hi[i]);
  }
  std::copy(merged.lo.begin(), merged.lo.end(), lo);
  std::copy(merged.hi.begin(), merged.hi.end(), hi);
}

// Short runs: the tensor as rows of channels * run_length columns, several such rows in one if they are narrow.
void observe_columns(const Tensor& x, FloatType type, const Runs& runs, float* lo, float* hi) {
  const auto kernel = kernels().elementwise.minmax_columns;
  const auto* in = static_cast<const char*>(x.const_data_ptr());
  const int64_t period = runs.channels * runs.run_length;
  const int64_t count = x.numel() / period;
  const int64_t repeats = std::min(count, ceil_div(kMinColumns, period));
  const int64_t width = period * repeats, rows = count / repeats;
  MinMax merged(runs.channels);
  const auto fold = [&](const MinMax& columns) {
    for (size_t i = 0; i < columns.lo.size(); ++i) {
      merged.merge(static_cast<int64_t>(i) % period / runs.run_length, columns.lo[i], columns.hi[i]);
    }
  };
  const int64_t chunks =
      std::clamp<int64_t>(rows * width / kGrain, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<MinMax> parts(static_cast<size_t>(chunks), MinMax(width));
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      MinMax& part = parts[static_cast<size_t>(chunk)];
      kernel(in, type, width, rows * chunk / chunks, rows * (chunk + 1) / chunks, part.lo.data(), part.hi.data());
    }
  });
  for (const MinMax& part : parts) fold(part);
  MinMax rest(period);  // the rows that did not fill a wide one
  kernel(in, type, period, rows * repeats, count, rest.lo.data(), rest.hi.data());
  fold(rest);
  std::copy(merged.lo.begin(), merged.lo.end(), lo);
  std::copy(merged.hi.begin(), merged.hi.end(), hi);
}

}  // namespace

Tensor fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                     OptionalInt group_size) {
  return fake_quantize_into(x, Grid(x, scale, zero_point, qmin, qmax, axis, group_size), nullptr);
}

std::tuple<Tensor, Tensor> fake_quantize_train(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                               OptionalInt axis, OptionalInt group_size) {
  const Grid grid(x, scale, zero_point, qmin, qmax, axis, group_size);
  Tensor mask = new_tensor({ceil_div(x.numel(), 8)}, ScalarType::Byte);
  Tensor y = fake_quantize_into(x, grid, static_cast<uint8_t*>(mask.mutable_data_ptr()));
  return {y, mask};
}

Tensor fake_quantize_backward(Tensor grad, Tensor mask) {
  const FloatType type = float_type(grad, "grad");
  check_type(mask, ScalarType::Byte, "mask");
  const Tensor grad_out = as_contiguous(grad);
  check(mask.is_contiguous() && mask.numel() == ceil_div(grad_out.numel(), 8), "mask has ", mask.numel(),
        " bytes; a gradient of ", grad_out.numel(), " elements needs ", ceil_div(grad_out.numel(), 8));
  Tensor grad_in = new_tensor(grad_out.sizes(), grad_out.scalar_type());
  const void* in = grad_out.const_data_ptr();
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  void* out = grad_in.mutable_data_ptr();
  const auto kernel = kernels().elementwise.mask_gradient;
  over_elements(grad_out.numel(), [&](int64_t begin, int64_t end) { kernel(in, bits, out, type, begin, end); });
  return grad_in;
}

Tensor quantize(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                OptionalInt group_size) {
  const FloatType type = float_type(x, "x");
  const Grid grid(x, scale, zero_point, qmin, qmax, axis, group_size);
  const Tensor input = as_contiguous(x);
  const bool is_int8 = qmin < 0 && qmin >= -128 && qmax <= 127, is_uint8 = qmin >= 0 && qmax <= 255;
  Tensor q = new_tensor(input.sizes(), is_int8 ? ScalarType::Char : is_uint8 ? ScalarType::Byte : ScalarType::Int);
  const void* in = input.const_data_ptr();
  void* out = q.mutable_data_ptr();
  const CodeType code = code_type(q);
  const auto kernel = kernels().elementwise.quantize;
  over_elements(input.numel(),
                [&](int64_t begin, int64_t end) { kernel(in, type, out, code, grid.get(), begin, end); });
  return q;
}

Tensor dequantize(Tensor q, Tensor scale, Tensor zero_point, OptionalInt axis, OptionalInt group_size,
                  ScalarType dtype) {
  const FloatType type = float_type(dtype, "the result");
  const CodeType code = code_type(q);
  const Grid grid(q, scale, zero_point, 0, 0, axis, group_size);
  const Tensor input = as_contiguous(q);
  Tensor y = new_tensor(input.sizes(), dtype);
  const void* in = input.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const auto kernel = kernels().elementwise.dequantize;
  over_elements(input.numel(),
                [&](int64_t begin, int64_t end) { kernel(in, code, out, type, grid.get(), begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> observe_minmax(Tensor x, OptionalInt axis, OptionalInt group_size) {
  const FloatType type = float_type(x, "x");
  const Runs runs = runs_of(x, axis, group_size);
  check(x.numel() > 0 || runs.channels == 0, "x is empty: it has no minimum and maximum");
  const Tensor input = as_contiguous(x);
  const std::vector<int64_t> shape = qparams_shape(x, runs, axis, group_size);
  Tensor lo = new_tensor(shape, ScalarType::Float), hi = new_tensor(shape, ScalarType::Float);
  if (runs.channels == 0) return {lo, hi};
  const bool columns = axis && runs.run_length < kShortRun && x.numel() > runs.channels * runs.run_length;
  (columns ? observe_columns : observe_runs)(input, type, runs, static_cast<float*>(lo.mutable_data_ptr()),
                                             static_cast<float*>(hi.mutable_data_ptr()));
  return {lo, hi};
}

std::tuple<Tensor, Tensor, Tensor> search_qparams(Tensor w, OptionalTensor importance, int64_t bits, bool symmetric,
                                                  bool narrow_range, int64_t group_size, int64_t grid,
                                                  double max_shrink, ScalarType scale_dtype, OptionalTensor codebook) {
  const FloatType type = float_type(w, "w"), scale_type = float_type(scale_dtype, "scale");
  check(w.dim() == 2, "w has ", w.dim(), " dimensions, not two");
  check(bits >= 1 && bits <= 8, "bits=", bits, " is outside 1..8");
  check(!narrow_range || (symmetric && bits > 1), "narrow_range needs a symmetric range of at least 2 bits");
  check(grid >= 1 && grid <= 1 << 20, "grid=", grid, " is not a positive number of candidates");
  check(max_shrink >= 0 && max_shrink < 1, "max_shrink=", max_shrink, " is outside [0, 1)");
  const int64_t rows = w.size(0), columns = w.size(1);
  check(group_size >= 1 && columns % group_size == 0, "group_size=", group_size, " does not divide the last size ",
        columns);
  const Tensor weights = as_contiguous(w);
  Tensor shared = weights;  // importance, if there is any
  if (importance) {
    check_type(*importance, ScalarType::Float, "importance");
    const bool per_column = importance->dim() == 1 && importance->size(0) == columns;
    check(per_column || (importance->dim() == 2 && importance->size(0) == rows && importance->size(1) == columns),
          "importance has neither the shape of w nor that of one of its rows");
    shared = as_contiguous(*importance);
  }
  const int64_t groups = columns / group_size;
  Tensor scale = new_tensor({rows, groups}, scale_dtype);
  Tensor zero_point = new_tensor({rows, groups}, ScalarType::Int);
  Tensor loss = new_tensor({rows, groups}, ScalarType::Float);
  const SearchOptions options = {.bits = static_cast<int>(bits),
                                 .symmetric = symmetric,
                                 .narrow_range = narrow_range,
                                 .steps = static_cast<int>(grid),
                                 .shrink_step = static_cast<float>(max_shrink / static_cast<double>(grid)),
                                 .scale_type = scale_type,
                                 .codebook = codebook ? check_codebook_entries(*codebook) : nullptr,
                                 .codebook_entries = codebook ? static_cast<int>(codebook->numel()) : 0};
  const ElementwiseKernels& kernel = kernels().elementwise;
  const auto* in = static_cast<const char*>(weights.const_data_ptr());
  const float* factors = importance ? static_cast<const float*>(shared.const_data_ptr()) : nullptr;
  const int64_t factor_stride = importance && importance->dim() == 2 ? columns : 0;
  auto* scale_out = static_cast<char*>(scale.mutable_data_ptr());
  auto* zero_out = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  auto* loss_out = static_cast<float*>(loss.mutable_data_ptr());
  const int64_t in_bytes = type == FloatType::kFloat32 ? 4 : 2, scale_bytes = scale_type == FloatType::kFloat32 ? 4 : 2;
  parallel_for(rows, kGrain / std::max<int64_t>(columns * grid, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> row(static_cast<size_t>(columns)), row_scale(static_cast<size_t>(groups));
    for (int64_t r = begin; r < end; ++r) {
      kernel.to_float(in + r * columns * in_bytes, type, row.data(), columns);
      const float* row_factors = factors == nullptr ? nullptr : factors + r * factor_stride;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * group_size;
        kernel.search_qparams(row.data() + at, row_factors == nullptr ? nullptr : row_factors + at, group_size, options,
                              row_scale.data() + g, zero_out + r * groups + g, loss_out + r * groups + g);
      }
      kernel.from_float(row_scale.data(), scale_type, scale_out + r * groups * scale_bytes, groups);
    }
  });
  return {scale, zero_point, loss};
}

}  // namespace halfbyte::ops
