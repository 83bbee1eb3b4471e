// The avxvnni level's primitives: those of avx2, with the dot product in one instruction.
#pragma once
#include "halfbyte/packing.h"
#include "simd_avx2_common.h"

namespace halfbyte {
namespace {

// 12 accumulators, 2 registers of codes and a broadcast: 15 of the 16 registers.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;
constexpr int kDirectAccumulators = 4;
constexpr int kSplitBelow = 4;
constexpr int direct_rows(int bits) { return bits == 4 ? 4 : k_unit(bits) < 32 ? 2 : 1; }
constexpr int float_direct_rows(int bits) { return direct_rows(bits); }
constexpr int narrow_quads(int) { return 1; }

template <int Bits>
using DotRow = U8x64;
template <int Bits>
using DotQuad = __m256i;
template <int Bits>
HALFBYTE_INLINE U8x64 dot_row(U8x64 codes) {
  return codes;
}
template <int Bits>
HALFBYTE_INLINE __m256i load_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm256_set1_epi32(quad);
}
template <int Bits>
HALFBYTE_INLINE I32x16 dot(I32x16 acc, U8x64 w, __m256i a) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, a), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, a)};
}

}  // namespace
}  // namespace halfbyte
