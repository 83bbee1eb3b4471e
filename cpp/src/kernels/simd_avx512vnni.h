// The avx512vnni level's primitives: simd_scalar.h lists them. One zmm register holds a panel (16 outputs).
#pragma once
#include <immintrin.h>

#include <cstring>

#include "halfbyte/packing.h"
#include "halfbyte/types.h"

#define HALFBYTE_INLINE inline __attribute__((always_inline))

namespace halfbyte {
namespace {

using F32x16 = __m512;
using I32x16 = __m512i;
using U8x64 = __m512i;

// 24 accumulators, 4 rows of codes and a broadcast: 29 of the 32 registers; 10 loads for 24 dot products.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 4;
constexpr int kDirectAccumulators = 16;
constexpr int kSplitBelow = 8;
constexpr int direct_rows(int bits) { return bits == 4 ? 4 : k_unit(bits) < 32 ? 2 : 1; }
constexpr int float_direct_rows(int bits) { return bits == 8 || bits == 4 ? 4 : bits == 2 ? 3 : 1; }
constexpr int narrow_quads(int) { return 1; }

HALFBYTE_INLINE F32x16 set_f32(float x) { return _mm512_set1_ps(x); }
HALFBYTE_INLINE F32x16 load_f32(const float* p) { return _mm512_loadu_ps(p); }
HALFBYTE_INLINE void store_f32(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
HALFBYTE_INLINE F32x16 add_f32(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
HALFBYTE_INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
HALFBYTE_INLINE F32x16 fma_f32(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
// vmaxps gives its second operand when either is NaN.
HALFBYTE_INLINE F32x16 max_abs(F32x16 x, F32x16 m) { return _mm512_max_ps(_mm512_abs_ps(x), m); }
HALFBYTE_INLINE I32x16 round_clamped(F32x16 x, float lo, float hi) {
  x = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(lo)), _mm512_set1_ps(hi)));
}

HALFBYTE_INLINE I32x16 set_i32(int32_t x) { return _mm512_set1_epi32(x); }
HALFBYTE_INLINE I32x16 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
HALFBYTE_INLINE void store_i32(int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x); }
HALFBYTE_INLINE void store_low_bytes(int8_t* p, I32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
HALFBYTE_INLINE I32x16 load_u8_to_i32(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I32x16 add_i32(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
HALFBYTE_INLINE I32x16 sub_i32(I32x16 a, I32x16 b) { return _mm512_sub_epi32(a, b); }
HALFBYTE_INLINE I32x16 mul_i32(I32x16 a, I32x16 b) { return _mm512_mullo_epi32(a, b); }
template <int Right, int Mask>
HALFBYTE_INLINE I32x16 shift_and_i32(I32x16 a) {
  return _mm512_and_si512(_mm512_srli_epi32(a, Right), _mm512_set1_epi32(Mask));
}
HALFBYTE_INLINE F32x16 to_float(I32x16 a) { return _mm512_cvtepi32_ps(a); }
HALFBYTE_INLINE F32x16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
HALFBYTE_INLINE F32x16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

HALFBYTE_INLINE U8x64 load_row(const uint8_t* p) { return _mm512_loadu_si512(p); }
HALFBYTE_INLINE void store_row(uint8_t* p, U8x64 x) { _mm512_storeu_si512(p, x); }
HALFBYTE_INLINE U8x64 or_rows(U8x64 a, U8x64 b) { return _mm512_or_si512(a, b); }
template <int Right, int Mask>
HALFBYTE_INLINE U8x64 shift_and(U8x64 a) {
  if constexpr (Right > 0) a = _mm512_srli_epi32(a, Right);
  if constexpr (Right < 0) a = _mm512_slli_epi32(a, -Right);
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(Mask)));
}

template <int Bits>
using DotRow = __m512i;
template <int Bits>
using DotQuad = __m512i;
template <int Bits>
HALFBYTE_INLINE __m512i dot_row(U8x64 codes) {
  return codes;
}
template <int Bits>
HALFBYTE_INLINE __m512i load_quad(const int8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof(quad));
  return _mm512_set1_epi32(quad);
}
template <int Bits>
HALFBYTE_INLINE I32x16 dot(I32x16 acc, __m512i w, __m512i a) {
  return _mm512_dpbusd_epi32(acc, w, a);
}

template <int Bits, int J, int Center>
HALFBYTE_INLINE F32x16 code_to_float(U8x64 codes) {
  if constexpr (Bits <= 4) {
    // vpermps looks at the low 4 bits of each lane, which are the code: a table of all 16 differences.
    constexpr float c = static_cast<float>(Center);
    const __m512 table = _mm512_setr_ps(0 - c, 1 - c, 2 - c, 3 - c, 4 - c, 5 - c, 6 - c, 7 - c, 8 - c, 9 - c, 10 - c,
                                        11 - c, 12 - c, 13 - c, 14 - c, 15 - c);
    return _mm512_permutexvar_ps(J == 0 ? codes : _mm512_srli_epi32(codes, 8 * J), table);
  } else {
    // A dot product with a 1 at input J and 0 elsewhere takes the byte out and adds -Center in one instruction.
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-Center), codes, _mm512_set1_epi32(1 << (8 * J))));
  }
}

using CodeTable = __m512;
HALFBYTE_INLINE CodeTable load_table(const float* p) { return _mm512_loadu_ps(p); }
template <int Bits, int J>
HALFBYTE_INLINE F32x16 look_up(CodeTable table, U8x64 codes) {
  return _mm512_permutexvar_ps(J == 0 ? codes : _mm512_srli_epi32(codes, 8 * J), table);
}

HALFBYTE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
}  // namespace halfbyte
