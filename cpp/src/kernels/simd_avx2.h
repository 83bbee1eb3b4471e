// The avx2 level's primitives: the dot product by 16-bit multiply-adds, none of which can saturate.
#pragma once
#include "halfbyte/packing.h"
#include "simd_avx2_common.h"

namespace halfbyte {
namespace {

constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;
constexpr int kDirectAccumulators = 4;
constexpr int kSplitBelow = 4;
constexpr int direct_rows(int bits) { return bits == 4 ? 4 : k_unit(bits) < 32 ? 2 : 1; }
constexpr int float_direct_rows(int bits) { return direct_rows(bits); }
// The largest code times 128, two such products to a sum: 15 * 256 * 8 and 31 * 256 * 4 are below 2^15.
#define HALFBYTE_NARROW_SUMS
constexpr int narrow_quads(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : 1; }
constexpr int kNarrowTileRows = 6;  // 12 sums, 2 registers of codes, a broadcast and a product: all 16

// Up to 7 bits, vpmaddubsw's sums of two products fit in 16 bits: |127 * -128 * 2| = 32512 < 2^15. With 8 bits they do
// not, so even and odd bytes are widened to 16 bits apart and vpmaddwd adds pairs of exact 32-bit products.
struct WideRow {
  U8x64 even, odd;
};
struct WideQuad {
  __m256i even, odd;
};
template <int Bits>
struct DotOperands {
  using Row = U8x64;
  using Quad = __m256i;
};
template <>
struct DotOperands<8> {
  using Row = WideRow;
  using Quad = WideQuad;
};
template <int Bits>
using DotRow = typename DotOperands<Bits>::Row;
template <int Bits>
using DotQuad = typename DotOperands<Bits>::Quad;

template <int Bits>
HALFBYTE_INLINE DotRow<Bits> dot_row(U8x64 codes) {
  if constexpr (Bits == 8) {
    const __m256i low_bytes = _mm256_set1_epi16(0xff);
    return {{_mm256_and_si256(codes.lo, low_bytes), _mm256_and_si256(codes.hi, low_bytes)},
            {_mm256_srli_epi16(codes.lo, 8), _mm256_srli_epi16(codes.hi, 8)}};
  } else {
    return codes;
  }
}
template <int Bits>
HALFBYTE_INLINE DotQuad<Bits> load_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  const __m256i a = _mm256_set1_epi32(quad);
  if constexpr (Bits == 8) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(a, 8)};
  } else {
    return a;
  }
}
template <int Bits>
HALFBYTE_INLINE I32x16 dot(I32x16 acc, const DotRow<Bits>& w, const DotQuad<Bits>& a) {
  if constexpr (Bits == 8) {
    acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.even.lo, a.even));
    acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.even.hi, a.even));
    acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.odd.lo, a.odd));
    acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.odd.hi, a.odd));
  } else {
    const __m256i ones = _mm256_set1_epi16(1);
    acc.lo = _mm256_add_epi32(acc.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(w.lo, a), ones));
    acc.hi = _mm256_add_epi32(acc.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(w.hi, a), ones));
  }
  return acc;
}

// The same for up to narrow_quads(Bits) quads, in 16 bits: two sums of an output, of two inputs each.
using NarrowSums = U8x64;
HALFBYTE_INLINE NarrowSums no_narrow_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HALFBYTE_INLINE NarrowSums dot_narrow(NarrowSums sums, U8x64 w, __m256i a) {
  return {_mm256_add_epi16(sums.lo, _mm256_maddubs_epi16(w.lo, a)),
          _mm256_add_epi16(sums.hi, _mm256_maddubs_epi16(w.hi, a))};
}
HALFBYTE_INLINE I32x16 widen(I32x16 acc, NarrowSums sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(sums.lo, ones)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(sums.hi, ones))};
}

}  // namespace
}  // namespace halfbyte
