// Sums of rows of a packed table. Bound by the latency of reading rows at random: while one row is added, the one that
// is kRowsAhead later is asked for. Beside that, 128 elements take about 40 vector operations a row.
#pragma once
#include "halfbyte/embedding_bag.h"
#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

constexpr int64_t kBagSums = 8;     // vectors of sums: 128 elements are one pass over the rows
constexpr int64_t kRowsAhead = 64;  // two bags or so

inline float scale_of(const BagTable& table, int64_t at) {
  if (table.scale_type == FloatType::kFloat32) return static_cast<const float*>(table.scale)[at];
  const uint16_t half[16] = {static_cast<const uint16_t*>(table.scale)[at]};
  float lanes[16];
  store_f32(lanes, table.scale_type == FloatType::kFloat16 ? load_f16(half) : load_bf16(half));
  return lanes[0];
}

// Into the second-level cache, which has more requests under way at a time than the first: half the time for a table in
// memory. GCC takes the builtin on every architecture.
HALFBYTE_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Inlined by force: GCC takes a function that only prefetches for one without effects, and drops calls of it.
HALFBYTE_INLINE void prefetch_row(const BagTable& table, int64_t groups, int64_t row) {
  const uint8_t* packed = table.codes + row * table.row_bytes;
  const int64_t lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(packed) % 64);
  for (int64_t byte = -lead; byte < table.row_bytes; byte += 64) prefetch_l2(packed + byte);
  const int64_t at = row * groups;
  prefetch_l2(static_cast<const uint8_t*>(table.scale) + at * (table.scale_type == FloatType::kFloat32 ? 4 : 2));
  if (table.zero_point != nullptr) prefetch_l2(table.zero_point + at);
}

// Elements of `Vectors` x 16 packed bytes of each row, from byte `offset` on; of one vector, only `bytes` are there.
// Vector v of code j holds elements (16 v + lane) * 8 / Bits + j: `out` is read and written through that order.
template <int Bits, int Vectors>
void sum_block(const BagTable& table, const Bag& bag, int64_t offset, int64_t bytes, float* out) {
  constexpr int kCodes = 8 / Bits;
  const int64_t groups = table.dim / table.group_size;
  int64_t group[Vectors];
  for (int v = 0; v < Vectors; ++v) group[v] = (offset + 16 * v) * kCodes / table.group_size;
  const int64_t first = offset * kCodes, count = std::min(bytes * kCodes, table.dim - first);
  float values[kCodes][16 * Vectors] = {};
  if (bag.add) {
    for (int64_t e = 0; e < count; ++e) values[e % kCodes][e / kCodes] = out[first + e];
  }
  F32x16 sum[kCodes][Vectors];
  unroll<kCodes>([&](auto j) { unroll<Vectors>([&](auto v) { sum[j][v] = load_f32(values[j] + 16 * v); }); });
  uint8_t whole[16] = {};
  for (int64_t i = 0; i < bag.count; ++i) {
    if (offset == 0 && i + kRowsAhead < bag.readable) prefetch_row(table, groups, bag.ids[i + kRowsAhead]);
    const int64_t row = bag.ids[i];
    if (row == bag.padding_row) continue;
    const uint8_t* packed = table.codes + row * table.row_bytes + offset;
    if (bytes < 16) {
      std::memcpy(whole, packed, static_cast<size_t>(bytes));
      packed = whole;
    }
    const float weight = bag.weights == nullptr ? 1.0f : bag.weights[i];
    F32x16 factor{};
    I32x16 zero{};
    unroll<Vectors>([&](auto v) {
      if (v == 0 || groups > 1) {
        const int64_t at = row * groups + group[v];
        factor = set_f32(weight * scale_of(table, at));
        zero = set_i32(table.zero_point == nullptr ? table.zero : table.zero_point[at]);
      }
      const I32x16 bytes_here = load_u8_to_i32(packed + 16 * v);
      unroll<kCodes>([&](auto j) {
        I32x16 code = bytes_here;
        if constexpr (Bits < 8) code = shift_and_i32<Bits * j, (1 << Bits) - 1>(bytes_here);
        sum[j][v] = fma_f32(factor, to_float(sub_i32(code, zero)), sum[j][v]);
      });
    });
  }
  unroll<kCodes>([&](auto j) { unroll<Vectors>([&](auto v) { store_f32(values[j] + 16 * v, sum[j][v]); }); });
  for (int64_t e = 0; e < count; ++e) out[first + e] = values[e % kCodes][e / kCodes];
}

template <int Bits>
void sum_rows_of(const BagTable& table, const Bag& bag, float* out) {
  constexpr int kVectors = kBagSums * Bits / 8;
  const int64_t used = ceil_div(table.dim * Bits, 8);
  int64_t offset = 0;
  for (; offset + 16 * kVectors <= used; offset += 16 * kVectors) {
    sum_block<Bits, kVectors>(table, bag, offset, 16 * kVectors, out);
  }
  for (; offset < used; offset += 16) {
    sum_block<Bits, 1>(table, bag, offset, std::min<int64_t>(16, used - offset), out);
  }
}

inline void sum_rows(const BagTable& table, const Bag& bag, float* out) {
  if (table.bits == 8) return sum_rows_of<8>(table, bag, out);
  if (table.bits == 4) return sum_rows_of<4>(table, bag, out);
  sum_rows_of<2>(table, bag, out);
}

constexpr EmbeddingBagKernels embedding_bag_kernels() { return {sum_rows}; }

}  // namespace
}  // namespace halfbyte
