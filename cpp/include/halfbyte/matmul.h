// Matrix products with low-bit weights in the tiles layout (packing.h), read as they are: no second copy, no packing
// step.
//
// Meaning of a weight: w[o, k] = scale[g, o] * (m * u[o, k] - z[g, o]), g = k / group_size; m = 1 and z = zero_point or
// 2^(bits-1); for bits == 1 without zero points (binary) m = 2 and z = 1, so that w = +-scale. With a codebook, for
// float activations only, w[o, k] = scale[g, o] * codebook[u[o, k]].
//
// Order of the arithmetic (the same on every ISA level, for every number of rows and threads, so the bits are equal):
//   int8 activations, x[i, k] = s_i * (a - za), groups in order, in each group chunks of kMaxChunk inputs in order:
//     t = m*sum(a*u) - z*sum(a) - za*(m*sum(u) - n*z)       exact in int32; n inputs in the chunk
//     acc = fma(scale[g, o], float(t), acc)                 starting from 0
//     y = fma(s_i, acc, bias)  (bias present)  or  s_i * acc
//   float activations, c = 2^(bits-1):
//     p = fma(x_k, float(u - c), p) for k in order, from 0 in each group
//     acc = fma(scale, p, acc)                              symmetric (z == c)
//     acc = fma(scale, fma(c - z, sum_x, p), acc)           with zero points
//     acc = fma(scale, fma(2, p, sum_x), acc)               binary: 2u - 1 = 2(u - c) + 1
//     acc = fma(scale, p, acc)                              codebook, with p = fma(x_k, codebook[u], p)
//     y = acc + bias  or  acc
//     sum_x of a group: 16 partial sums, one for each k % 16 counted from the start of the group, each in order from 0;
//     then lane l takes lane l + 8, l + 4, l + 2, l + 1
// Outputs past O are never read back; padded inputs have a == 0 and x == 0.
#pragma once
#include "halfbyte/elementwise.h"
#include "halfbyte/packing.h"
#include "halfbyte/types.h"

namespace halfbyte {

constexpr int64_t kMaxChunk = 32768;  // 255 * 128 * 32768 < 2^31: int32 sums cannot overflow (a in [-128, 127])

struct TiledWeight {
  TileShape shape;
  const uint8_t* codes;  // [panels, panel_bytes]
  const void* scale;     // [groups, out_features], scale_type
  FloatType scale_type;
  const uint8_t* zero_point;        // [groups, out_features] or null
  const float* codebook = nullptr;  // [kCodebookEntries] or null; then bits <= 4 and there are no zero points
};

// Chunks of at most kMaxChunk inputs in one group.
static inline int64_t chunks_per_group(const TileShape& shape) { return ceil_div(shape.padded_group(), kMaxChunk); }

// Distance of two rows of activations, in elements: an odd number of cache lines, so that the same column of several
// rows does not compete for one cache set.
static inline int64_t code_stride(const TileShape& shape) { return round_up(shape.padded_in(), 64) | 64; }
static inline int64_t float_stride(const TileShape& shape) { return round_up(shape.padded_in(), 16) | 16; }

// int8 rows laid out as the products read them: group padding zeroed.
struct QuantizedRows {
  int8_t* codes;       // [rows, code_stride()]
  float* scale;        // [rows]
  int32_t* chunk_sum;  // [rows, groups * chunks_per_group()]: sum(a) over each chunk
  int32_t zero_point;  // of every row; 0 for symmetric
};

struct MatmulKernels {
  // Rows [row_begin, row_end) of float32 x (row stride ldx) into `out`. Symmetric per row: scale = max(absmax/127,
  // FLT_MIN), q = clamp(round(x * (1/scale)), -127, 127), NaN -> 0.
  void (*quantize_rows_dynamic)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                                const QuantizedRows& out);
  // Given qparams (one scale, out.zero_point in [-128, 127]): q = clamp(round(x * (1/scale)) + zero_point, -128, 127),
  // NaN -> zero_point.
  void (*quantize_rows_static)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape,
                               float scale, const QuantizedRows& out);
  // float32 rows copied with group padding zeroed (row stride float_stride()), and sum_x per group: [rows, groups].
  void (*pad_rows)(const float* x, int64_t ldx, int64_t row_begin, int64_t row_end, const TileShape& shape, float* out,
                   float* group_sum);
  // y[row_begin:row_end, panels [panel_begin, panel_end)] (row stride ldy). `scratch`: scratch_bytes(shape), 64-byte
  // aligned, for one call.
  void (*matmul_int8)(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end,
                      int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch);
  void (*matmul_float)(const TiledWeight& w, const float* x, const float* group_sum, int64_t row_begin, int64_t row_end,
                       int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch);
  int64_t (*scratch_bytes)(const TileShape& shape);
  int64_t panels_per_tile;      // panels one inner tile spans: split work in multiples of it
  int64_t rows_per_tile;        // and of rows, where rows are split
  int64_t float_rows_per_tile;  // rows of the inner tile of matmul_float
};

}  // namespace halfbyte
