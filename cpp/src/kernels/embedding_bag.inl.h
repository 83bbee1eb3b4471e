// Sums of rows of a packed table. Bound by the latency of reading rows at random, which the caller hides by
// prefetching; beside that, 128 elements take about 40 vector operations a row.
#pragma once
#include "halfbyte/embedding_bag.h"
#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

constexpr int64_t kBagSums = 8;  // vectors of sums: 128 elements are one pass over the rows

// Elements of `Vectors` x 16 packed bytes of each row, from byte `offset` on; of one vector, only `bytes` are there.
// Vector v of code j holds elements (16 v + lane) * 8 / Bits + j: out is written through that order at the end.
template <int Bits, int Vectors>
void sum_block(const BagRows& rows, int64_t offset, int64_t bytes, float* out) {
  constexpr int kCodes = 8 / Bits;
  const int64_t groups = rows.dim / rows.group_size;
  int64_t group[Vectors];
  for (int v = 0; v < Vectors; ++v) group[v] = (offset + 16 * v) * kCodes / rows.group_size;
  F32x16 sum[kCodes][Vectors];
  unroll<kCodes>([&](auto j) { unroll<Vectors>([&](auto v) { sum[j][v] = set_f32(0.0f); }); });
  alignas(64) uint8_t whole[64] = {}, codes[kCodes][64];
  for (int64_t r = 0; r < rows.count; ++r) {
    const uint8_t* packed = rows.codes[r] + offset;
    if (bytes < 16) {
      std::memcpy(whole, packed, static_cast<size_t>(bytes));
      packed = whole;
    }
    if constexpr (Bits != 8) {
      if (Vectors < 4 && bytes >= 16) {
        unroll<Vectors>([&](auto v) { std::memcpy(whole + 16 * v, packed + 16 * v, 16); });
        packed = whole;
      }
      const U8x64 row = load_row(packed);
      unroll<kCodes>([&](auto j) { store_row(codes[j], shift_and<Bits * j, (1 << Bits) - 1>(row)); });
    }
    const float* factor = rows.factor + r * groups;
    const int32_t* zero = rows.zero + r * groups;
    unroll<Vectors>([&](auto v) {
      const F32x16 times = set_f32(factor[group[v]]);
      const I32x16 minus = set_i32(zero[group[v]]);
      unroll<kCodes>([&](auto j) {
        const uint8_t* from = (Bits == 8 ? packed : codes[j]) + 16 * v;
        sum[j][v] = fma_f32(times, to_float(sub_i32(load_u8_to_i32(from), minus)), sum[j][v]);
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
  constexpr int kVectors = kBagSums * Bits / 8;
  const int64_t row_bytes = ceil_div(rows.dim * Bits, 8);
  int64_t offset = 0;
  for (; offset + 16 * kVectors <= row_bytes; offset += 16 * kVectors) {
    sum_block<Bits, kVectors>(rows, offset, 16 * kVectors, out);
  }
  for (; offset < row_bytes; offset += 16) {
    sum_block<Bits, 1>(rows, offset, std::min<int64_t>(16, row_bytes - offset), out);
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
