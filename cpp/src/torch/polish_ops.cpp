// gptq_polish: checks, the Hessian as the kernel reads it, threads.
#include <algorithm>

#include "aligned_scratch.h"
#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {

std::tuple<Tensor, Tensor, Tensor> gptq_polish(Tensor weight, Tensor hessian, Tensor codes, Tensor scale,
                                               Tensor zero_point, int64_t bits, bool symmetric, bool narrow_range,
                                               int64_t group_size, int64_t sweeps, bool refit, ScalarType scale_dtype) {
  const FloatType type = float_type(weight, "weight"), scale_type = float_type(scale_dtype, "scale");
  check(weight.dim() == 2, "weight has ", weight.dim(), " dimensions, not two");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(bits >= 1 && bits <= 8, "bits=", bits, " is outside 1..8");
  check(!narrow_range || (symmetric && bits > 1), "narrow_range needs a symmetric range of at least 2 bits");
  check(columns >= 1 && columns < 1 << 24, "weight has ", columns, " columns");
  check(group_size >= 1 && columns % group_size == 0, "group_size=", group_size, " does not divide ", columns,
        " columns");
  check(sweeps >= 0 && sweeps <= 1 << 20, "sweeps=", sweeps, " is negative or too large");
  const int64_t groups = columns / group_size;
  check_type(hessian, ScalarType::Float, "hessian");
  check_matrix(hessian, "hessian", columns, columns);
  check_type(codes, ScalarType::Byte, "codes");
  check_matrix(codes, "codes", rows, columns);
  check_type(scale, ScalarType::Float, "scale");
  check_matrix(scale, "scale", rows, groups);
  check_type(zero_point, ScalarType::Int, "zero_point");
  check_matrix(zero_point, "zero_point", rows, groups);

  const Tensor weights = as_contiguous(weight), symmetric_matrix = as_contiguous(hessian);
  const Tensor new_codes = torch::stable::clone(as_contiguous(codes));
  const Tensor new_scale = torch::stable::clone(as_contiguous(scale));
  const Tensor new_zero_point = torch::stable::clone(as_contiguous(zero_point));
  const int64_t range = polish_range(group_size), range_slots = round_up(range, kFeedbackColumns);
  const int64_t last = columns / range * range;  // columns of the ranges that are full
  const int64_t slots = columns / range * range_slots + round_up(columns - last, kFeedbackColumns);
  const AlignedScratch panels(slots * columns * static_cast<int64_t>(sizeof(float)));
  const auto* matrix = static_cast<const float*>(symmetric_matrix.const_data_ptr());
  parallel_for(slots / kFeedbackColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t slot = panel * kFeedbackColumns, within = slot % range_slots;
      const int64_t first = slot / range_slots * range + within;
      const int64_t count = std::min({kFeedbackColumns, range - within, columns - first});
      float* out = panels.floats() + slot * columns;
      for (int64_t j = 0; j < columns; ++j, out += kFeedbackColumns) {
        for (int64_t c = 0; c < kFeedbackColumns; ++c) out[c] = c < count ? matrix[j * columns + first + c] : 0.f;
      }
    }
  });
  const PolishProblem problem = {.weight = weights.const_data_ptr(),
                                 .weight_type = type,
                                 .rows = rows,
                                 .columns = columns,
                                 .hessian = panels.floats(),
                                 .group_size = group_size,
                                 .options = {.bits = static_cast<int>(bits),
                                             .symmetric = symmetric,
                                             .narrow_range = narrow_range,
                                             .steps = 1,
                                             .shrink_step = 0.f,
                                             .scale_type = scale_type},
                                 .sweeps = static_cast<int>(sweeps),
                                 .refit = refit,
                                 .scale = static_cast<float*>(new_scale.mutable_data_ptr()),
                                 .zero_point = static_cast<int32_t*>(new_zero_point.mutable_data_ptr()),
                                 .codes = static_cast<uint8_t*>(new_codes.mutable_data_ptr())};
  const GptqKernels& kernel = kernels().gptq;
  // Few rows are cut finer, so that every thread gets some; it does not change what a row gives.
  const int64_t row_panels = ceil_div(rows, kPanelWidth);
  const int64_t per_task = std::clamp<int64_t>(row_panels / 8, 1, kRoundPanels);
  parallel_for(ceil_div(row_panels, per_task), 1, [&](int64_t begin, int64_t end) {
    const int64_t step = per_task * kPanelWidth;
    const AlignedScratch scratch(kernel.polish_scratch(problem, std::min(step, rows)));
    for (int64_t task = begin; task < end; ++task) {
      kernel.polish_rows(problem, task * step, std::min((task + 1) * step, rows), scratch.get());
    }
  });
  return {new_codes, new_scale, new_zero_point};
}

}  // namespace halfbyte::ops
