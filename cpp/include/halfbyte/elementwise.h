// Elementwise kernels: fake-quantize, quantize, dequantize, min/max, float conversions.
//
// Every granularity is one picture: contiguous `x` is cut into *runs* of `run_length` elements, and run r uses
// qparams[r % channels]. Per tensor: one run, one channel. Per axis: run_length = product of the sizes after the axis,
// channels = size of the axis. Per group / per token: run_length = group size, channels = number of runs.
// The last axis (run_length == 1) has its own "columns" kernels, where the qparams advance with the element.
//
// Numbers (docs/design/architecture.md, "Numeric contract"):
//   r = clamp(round_half_even(x * (1 / scale)), qmin - zero_point, qmax - zero_point), all in float32
//   quantize: q = r + zero_point (NaN -> zero_point);  fake-quantize: y = r * scale (NaN -> NaN, never -0)
//   mask bit = (qmin <= round(x / scale) + zero_point <= qmax), 0 for NaN
#pragma once
#include "halfbyte/types.h"

namespace halfbyte {

enum class CodeType : int { kInt8 = 0, kUInt8 = 1, kInt32 = 2 };

// qparams of the runs [run_begin, run_end) that one call handles.
struct AffineGrid {
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int64_t channels;
  int64_t run_length;  // elements that share one scale
  int32_t qmin, qmax;
};

struct ElementwiseKernels {
  // x, y: `type`; elements [begin, end) of the tensor, where `begin` is a multiple of 64 or the start of a run.
  // mask (may be null): one bit an element, each run starting on a fresh byte: ceil(run_length / 8) bytes a run, lowest
  // bit first. For run_length == 1 (axis last) a "run" of the mask is a row of `channels` elements.
  void (*fake_quantize)(const void* x, void* y, uint8_t* mask, FloatType type, const AffineGrid& grid, int64_t begin,
                        int64_t end);
  // grad_in = mask ? grad_out : 0, with mask rows of `mask_run` elements as above.
  void (*mask_gradient)(const void* grad_out, const uint8_t* mask, void* grad_in, FloatType type, int64_t mask_run,
                        int64_t begin, int64_t end);
  void (*quantize)(const void* x, FloatType type, void* q, CodeType code, const AffineGrid& grid, int64_t begin,
                   int64_t end);
  void (*dequantize)(const void* q, CodeType code, void* y, FloatType type, const AffineGrid& grid, int64_t begin,
                     int64_t end);
  // Min and max of each of the runs [run_begin, run_end) into lo/hi[run]; NaN anywhere in a run gives NaN in both.
  void (*minmax_runs)(const void* x, FloatType type, int64_t run_length, int64_t run_begin, int64_t run_end, float* lo,
                      float* hi);
  // Min and max of each column of x[row_begin:row_end, columns] merged into lo/hi[columns] (same NaN rule).
  void (*minmax_columns)(const void* x, FloatType type, int64_t columns, int64_t row_begin, int64_t row_end, float* lo,
                         float* hi);
  void (*to_float)(const void* x, FloatType type, float* y, int64_t count);
  void (*from_float)(const float* x, FloatType type, void* y, int64_t count);  // round half to even
};

}  // namespace halfbyte
