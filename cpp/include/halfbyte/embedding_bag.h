// The weighted sum of some rows of a low-bit table, read as they are packed (the rows layout of packing.h).
//
//   out[e] = sum over rows r in order of fma(weight * scale[r, g], float(u[r, e] - zero[r, g]), sum); g = e /
//   group_size
//
// from 0, or from what `out` holds. The bits are equal on every level.
#pragma once
#include "halfbyte/elementwise.h"
#include "halfbyte/types.h"

namespace halfbyte {

struct BagTable {
  const uint8_t* codes;  // row r begins at r * row_bytes
  int64_t row_bytes;
  const void* scale;  // [rows, groups], scale_type
  FloatType scale_type;
  const uint8_t* zero_point;  // [rows, groups], or null: `zero` for all
  int32_t zero;
  int64_t dim, group_size;
  int bits;  // 8, 4 or 2; of several groups, each must fill whole vectors: group_size % bag_vector(bits) == 0
};

constexpr int64_t bag_vector(int bits) { return 16 * (8 / bits); }  // elements of sixteen packed bytes

struct Bag {
  const int64_t* ids;
  int64_t count;
  int64_t readable;      // entries of `ids` that are there, those of later bags included: rows to ask memory for
  const float* weights;  // [count], or null: 1
  int64_t padding_row;   // left out; -1: none
  bool add;              // to what `out` holds
};

struct EmbeddingBagKernels {
  void (*sum_rows)(const BagTable& table, const Bag& bag, float* out);
};

}  // namespace halfbyte
