// The gradient of fake-quantize with learned scale and zero point (LSQ, arXiv:1902.08153; LSQ+, arXiv:2004.09576), all
// three parts in one pass over x and the gradient.
//
// With v = x * (1 / scale), code = clamp(round_half_even(v), qmin - zero_point, qmax - zero_point) and inside = (code
// == round_half_even(v)), all in float32:
//   grad_x          = inside ? grad : 0
//   grad_scale      = grad_factor * sum(grad * (inside ? code - v : code))
//   grad_zero_point = grad_factor * -scale * sum(inside ? 0 : grad)
// code - v is exact in float32: the two are within 1/2 of each other. NaN in x gives NaN in grad_scale and counts as
// outside. That is Estimator::kRounded, what PyTorch computes. The papers' own estimators look at v instead of the
// code: inside = lowest < v < highest, and with kPact (arXiv:1805.06085) only what lies outside moves the scale.
//
// Codebooks: entry = the value nearest to v (codebook.inl.h), inside = clip_low <= v <= clip_high, gradients of x and
// scale as above with the entry as code. This is SEQ (ParetoQ, arXiv:2502.02631) for the values +-1/4, +-3/4. Binary
// codebooks (-1, 1) take +1 for x >= 0, and the scale's exact derivative: grad_scale = grad_factor * sum(grad * entry).
//
// Sums are the same bits for every ISA level and number of threads: float32 chains of at most kGradientBlock /
// kElementLanes additions, whose elements depend on the shape alone; the caller adds chains up in float64, in order.
#pragma once
#include "halfbyte/elementwise.h"

namespace halfbyte {

constexpr int64_t kGradientBlock = 4096;  // elements of a run that are summed in float32: 256 in each of 16 lanes
constexpr int64_t kGradientRows = 64;     // rows that are summed in float32

// Which values count as inside, and what moves the scale.
enum class Estimator : int { kRounded = 0, kLsq = 1, kPact = 2 };

// Sums over grad as above, without the factors.
struct GradientSums {
  float* scale;       // grad * (inside ? code - v : code)
  float* zero_point;  // inside ? 0 : grad
};

// Qparams of the columns of a matrix, in the form the kernel reads. Each array is readable for kElementLanes - 1
// entries past the last column.
struct ColumnGrid {
  const float* inverse_scale;
  const float* lowest;   // qmin - zero_point
  const float* highest;  // qmax - zero_point
};

// Run r of `run_length` elements is scaled by scale[r].
struct CodebookGrid {
  const float* scale;
  const float* values;  // [entries], increasing
  int entries;          // 2 .. kCodebookEntries
  bool binary;          // values are -1 and 1
  float clip_low, clip_high;
  int64_t run_length;
};

struct TrainingKernels {
  // Runs are cut into blocks of kGradientBlock elements (the last one of a run may be shorter), numbered through the
  // tensor. Blocks [block_begin, block_end): grad_x, and lane sums added pairwise into sums[block]. grid.run_length is
  // the true length of a run, also for 1; inverse_scale is not read.
  void (*learned_gradient_runs)(const void* x, const void* grad, void* grad_x, FloatType type, const AffineGrid& grid,
                                Estimator estimator, int64_t block_begin, int64_t block_end, const GradientSums& sums);
  // x[0:count] as rows of `columns` (the last row may be shorter). Rows [row_begin, row_end), columns [column_begin,
  // column_end), column_begin a multiple of kElementLanes: grad_x, and sums[column] over the rows in order, which start
  // at 0. Sums are written for kElementLanes - 1 columns past the end.
  void (*learned_gradient_columns)(const void* x, const void* grad, void* grad_x, FloatType type,
                                   const ColumnGrid& grid, Estimator estimator, int64_t count, int64_t columns,
                                   int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                                   const GradientSums& sums);
  // Runs [run_begin, run_end): y = entry * scale; NaN stays NaN.
  void (*codebook_fake_quantize)(const void* x, void* y, FloatType type, const CodebookGrid& grid, int64_t run_begin,
                                 int64_t run_end);
  // Blocks as of learned_gradient_runs: grad_x, and the sums for the scale.
  void (*codebook_gradient)(const void* x, const void* grad, void* grad_x, FloatType type, const CodebookGrid& grid,
                            int64_t block_begin, int64_t block_end, float* sums);
};

}  // namespace halfbyte
