// Elementwise kernels: fake-quantize, quantize, dequantize, min/max, scale search, float conversions.
//
// Every granularity is one picture: contiguous `x` is cut into *runs* of `run_length` elements, and run r uses
// qparams[r % channels]. Per tensor: one run, one channel. Per axis: run_length = product of the sizes after the axis,
// channels = size of the axis. Per group / per token: run_length = group size, channels = number of runs.
// Where runs are short (the last axis: run_length == 1) the qparams advance with the element; those are read as
// vectors.
//
// Numbers (docs/design/architecture.md, "Numeric contract"):
//   r = clamp(round_half_even(x * (1 / scale)), qmin - zero_point, qmax - zero_point), all in float32
//   quantize: q = r + zero_point (NaN -> zero_point);  fake-quantize: y = r * scale (NaN -> NaN, never -0)
//   mask bit = (qmin <= round(x / scale) + zero_point <= qmax), 0 for NaN
#pragma once
#include "halfbyte/types.h"

namespace halfbyte {

enum class CodeType : int { kInt8 = 0, kUInt8 = 1, kInt32 = 2 };

constexpr int64_t kElementLanes = 16;       // elements that every level handles together
constexpr int64_t kElementBlock = 64;       // ranges of elements begin at multiples of this
constexpr int64_t kCodebookEntries = 16;    // at most; tables of kernels have all, one for every 4-bit code
constexpr int32_t kMaxCode = 1 << 20;       // |qmin| and |qmax| at most: rounding by addition needs |r| < 2^22
constexpr int32_t kMaxZeroPoint = 1 << 20;  // |zero_point| at most

struct AffineGrid {
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int64_t channels;
  int64_t run_length;  // elements that share one scale
  int32_t qmin, qmax;
  // Null, or 1 / scale: then run_length == 1 and qparams are read as vectors. For that channels >= kElementLanes, and
  // all three arrays repeat their first kElementLanes - 1 entries after the last one, so that a vector may begin at any
  // channel.
  const float* inverse_scale;
};

// The grid p_j = 1 - j * shrink_step, j = 0 .. steps - 1, of ranges that search_qparams tries for a group of weights.
// With a codebook, x_hat = scale * (the entry nearest to x / scale), the whole range is absmax / largest entry, and
// bits, symmetric and narrow_range are not read.
struct SearchOptions {
  int bits;
  bool symmetric;     // signed codes around 0; one symmetric bit is +-scale
  bool narrow_range;  // symmetric only: qmin = -qmax
  int steps;          // >= 1; 1 gives min/max qparams
  float shrink_step;  // steps * shrink_step < 1
  FloatType scale_type;
  const float* codebook = nullptr;  // [codebook_entries], increasing
  int codebook_entries = 0;         // 2 .. kCodebookEntries
};

struct ElementwiseKernels {
  // The first four: elements [begin, end) of the tensor; begin is a multiple of kElementBlock, end too or the tensor's
  // end. mask (may be null): one bit an element, lowest bit first, ceil(elements / 8) bytes; bits past the end are 0.
  void (*fake_quantize)(const void* x, void* y, uint8_t* mask, FloatType type, const AffineGrid& grid, int64_t begin,
                        int64_t end);
  // grad_in = mask ? grad_out : 0
  void (*mask_gradient)(const void* grad_out, const uint8_t* mask, void* grad_in, FloatType type, int64_t begin,
                        int64_t end);
  void (*quantize)(const void* x, FloatType type, void* q, CodeType code, const AffineGrid& grid, int64_t begin,
                   int64_t end);
  void (*dequantize)(const void* q, CodeType code, void* y, FloatType type, const AffineGrid& grid, int64_t begin,
                     int64_t end);
  // Min and max of each of the runs [run_begin, run_end) into lo/hi[run]; NaN anywhere in a run gives NaN in both.
  // Zeros come out as +0; an empty run gives (+inf, -inf).
  void (*minmax_runs)(const void* x, FloatType type, int64_t run_length, int64_t run_begin, int64_t run_end, float* lo,
                      float* hi);
  // Min and max of each column of x[row_begin:row_end, columns] merged into lo/hi[columns] (same rules).
  void (*minmax_columns)(const void* x, FloatType type, int64_t columns, int64_t row_begin, int64_t row_end, float* lo,
                         float* hi);
  // The qparams of one group of `count` weights that minimise sum(importance * (x_hat - w)^2) over the grid, then over
  // one weighted least-squares refit of the scale to the winning codes. The scale is rounded to scale_type before
  // errors are taken. Sums run in kElementLanes lanes (i % kElementLanes) that are added pairwise at the end.
  // importance may be null (all ones). A group that holds NaN or inf gives scale = loss = NaN.
  void (*search_qparams)(const float* w, const float* importance, int64_t count, const SearchOptions& options,
                         float* scale, int32_t* zero_point, float* loss);
  void (*to_float)(const void* x, FloatType type, float* y, int64_t count);
  void (*from_float)(const float* x, FloatType type, void* y, int64_t count);  // round half to even
};

}  // namespace halfbyte
