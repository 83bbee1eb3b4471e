// Matrix products with low-bit weights in the tiles layout (packing.h), read as they are: no second copy, no packing step.
//
// Meaning of a weight: w[o, k] = scale[g, o] * (m * u[o, k] - z[g, o]), g = k / group_size; m = 1 and z = zero_point or
// 2^(bits-1); for bits == 1 without zero points (binary) m = 2 and z = 1, so that w = +-scale.
//
// Order of the arithmetic (the same on every ISA level, for every number of rows and threads, so the bits are equal):
//   int8 activations, x[i, k] = s_i * (a - za_i), groups in order, with k chunks of at most kMaxChunk inside a group:
//     t = m*sum(a*u) - z*sum(a) - za*(m*sum(u) - n*z)       exact in int32
//     acc = fma(scale[g, o], float(t), acc)                 starting from 0
//     y = fma(s_i, acc, bias)  (bias present)  or  s_i * acc
//   float activations:
//     p = fma(x_k, float(u - c), p) for k in order, from 0, c = 2^(bits-1) (binary: c = 0)
//     acc = fma(scale, p, acc)                              symmetric (z == c)
//     acc = fma(scale, fma(c - z, sum_x, p), acc)           with zero points; sum_x = x_k summed in order in float32
//     binary: acc = fma(scale, 2*p - sum_x, acc)
//     y = acc + bias
// Outputs past O are never read back; padded inputs have a == 0 and x == 0.
#pragma once
#include "halfbyte/packing.h"
#include "halfbyte/types.h"

namespace halfbyte {

constexpr int64_t kMaxChunk = 32768;  // 255 * 128 * 32768 < 2^31: int32 sums cannot overflow (a in [-128, 127])

struct TiledWeight {
  TileShape shape;
  const uint8_t* codes;       // [panels, panel_bytes]
  const void* scale;          // [groups, out_features], scale_type
  FloatType scale_type;
  const uint8_t* zero_point;  // [groups, out_features] or null
};

// int8 rows laid out as the products read them: group padding zeroed, row stride padded_in().
struct QuantizedRows {
  int8_t* codes;        // [rows, padded_in]
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows]; 0 for symmetric
  int32_t* group_sum;   // [rows, groups]: sum(a) over each group
};

struct MatmulKernels {
  // Rows [row_begin, row_end) of float32 x (row stride ldx) into `out`. Symmetric per row: scale = max(absmax/127, FLT_MIN),
  // q = clamp(round(x * (1/scale)), -127, 127), NaN -> 0.
  void (*quantize_rows_dynamic)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                                const QuantizedRows& out);
  // Given qparams (one scale, one zero_point in [-128, 127]): q = clamp(round(x * (1/scale)) + zero_point, -128, 127).
  void (*quantize_rows_static)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                               float scale, int32_t zero_point, const QuantizedRows& out);
  // float32 rows copied with group padding zeroed (row stride padded_in()), and sum_x per group.
  void (*pad_rows)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape, float* out,
                   float* group_sum);
  // y[row_begin:row_end, panels [panel_begin, panel_end)] (row stride ldy). `scratch`: scratch_bytes(shape) for one call.
  void (*matmul_int8)(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end,
                      int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch);
  void (*matmul_float)(const TiledWeight& w, const float* x, const float* group_sum, int64_t row_begin, int64_t row_end,
                       int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch);
  int64_t (*scratch_bytes)(const TileShape& shape, int64_t rows);
  int64_t panels_per_tile;  // panels one inner tile spans: split work in multiples of it
};

}  // namespace halfbyte
