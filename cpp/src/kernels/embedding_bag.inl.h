// Sums of rows of a packed table. Bound by the latency of reading rows at random, which the caller hides by
// prefetching; beside that, 128 elements take about 30 vector operations a row.
#pragma once
#include "halfbyte/embedding_bag.h"
#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

constexpr int64_t kBagBlock = 64;  // packed bytes of a row that are summed at a time

// Elements of one block: `bytes` packed bytes of each row, in `Vectors` = ceil(bytes / 16) vectors for each of the
// 8 / Bits codes in a byte. Vector v of code j holds elements (16 v + lane) * 8 / Bits + j, so out is written through
// that order at the end.
template <int Bits, int Vectors>
void sum_block(const BagRows& rows, int64_t offset, int64_t bytes, float* out) {
  constexpr int kCodes = 8 / Bits;
  const int64_t groups = rows.dim / rows.group_size;
  int64_t group[Vectors];
  for (int v = 0; v < Vectors; ++v) group[v] = (offset + 16 * v) * kCodes / rows.group_size;
  F32x16 sum[kCodes][Vectors];
  unroll<kCodes>([&](auto j) { unroll<Vectors>([&](auto v) { sum[j][v] = set_f32(0.0f); }); });
  for (int64_t r = 0; r < rows.count; ++r) {
    const uint8_t* packed = rows.codes[r] + offset;
    alignas(64) uint8_t whole[kBagBlock];
    if (bytes % 16 != 0 || (Bits != 8 && bytes < kBagBlock)) {
      std::memset(whole, 0, sizeof(whole));
      std::memcpy(whole, packed, static_cast<size_t>(bytes));
      packed = whole;
    }
    alignas(64) uint8_t codes[kCodes][kBagBlock];
    if constexpr (Bits != 8) {
      const U8x64 row = load_row(packed);
      unroll<kCodes>([&](auto j) { store_row(codes[j], shift_and<Bits * j, (1 << Bits) - 1>(row)); });
    }
    const float* factor = rows.factor + r * groups;
    const int32_t* zero = rows.zero + r * groups;
    unroll<Vectors>([&](auto v) {
      const F32x16 times = set_f32(factor[group[v]]);
      const I32x16 minus = set_i32(zero[group[v]]);
      unroll<kCodes>([&](auto j) {
        const uint8_t* from = Bits == 8 ? packed : codes[j];
        sum[j][v] = fma_f32(times, to_float(sub_i32(load_u8_to_i32(from + 16 * v), minus)), sum[j][v]);
      });
    });
  }
  const int64_t first = offset * kCodes, count = std::min(bytes * kCodes, rows.dim - first);
  unroll<kCodes>([&](auto j) {
    float values[16 * Vectors];
    unroll<Vectors>([&](auto v) { store_f32(values + 16 * v, sum[j][v]); });
    for (int64_t e = j, i = 0; e < count; e += kCodes, ++i) out[first + e] = values[i];
  });
}

template <int Bits>
void sum_rows_of(const BagRows& rows, float* out) {
  const int64_t row_bytes = ceil_div(rows.dim * Bits, 8);
  for (int64_t offset = 0; offset < row_bytes; offset += kBagBlock) {
    const int64_t bytes = std::min(kBagBlock, row_bytes - offset);
    switch (ceil_div(bytes, 16)) {
      case 1:
        sum_block<Bits, 1>(rows, offset, bytes, out);
        break;
      case 2:
        sum_block<Bits, 2>(rows, offset, bytes, out);
        break;
      case 3:
        sum_block<Bits, 3>(rows, offset, bytes, out);
        break;
      default:
        sum_block<Bits, 4>(rows, offset, bytes, out);
    }
  }
}

inline void sum_rows(const BagRows& rows, float* out) {
  if (rows.bits == 8) return sum_rows_of<8>(rows, out);
  if (rows.bits == 4) return sum_rows_of<4>(rows, out);
  sum_rows_of<2>(rows, out);
}

constexpr EmbeddingBagKernels embedding_bag_kernels() { return {sum_rows}; }

}  // namespace
}  // namespace halfbyte
