// The weighted sum of some rows of a low-bit table, read as they are packed (the rows layout of packing.h).
//
//   out[e] = sum over rows r in order of fma(factor[r, g], float(u[r, e] - zero[r, g]), sum), from 0; g = e /
//   group_size
//
// A factor is a row's scale, times the weight that a bag gives the row. The bits are equal on every level.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte {

struct BagRows {
  const uint8_t* const* codes;  // [count]: packed codes of each row
  const float* factor;          // [count, groups]
  const int32_t* zero;          // [count, groups]
  int64_t count, dim, group_size;
  int bits;  // 8, 4 or 2; of several groups, each must fill whole vectors: group_size % bag_vector(bits) == 0
};

constexpr int64_t bag_vector(int bits) { return 16 * (8 / bits); }  // elements of sixteen packed bytes

struct EmbeddingBagKernels {
  void (*sum_rows)(const BagRows& rows, float* out);
};

}  // namespace halfbyte
