// What the avx2 and avxvnni levels share: two ymm registers hold a panel (outputs 0-7 and 8-15). simd_scalar.h lists
// the primitives; simd_avx2.h and simd_avxvnni.h add the tile sizes and the dot product.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "halfbyte/types.h"

#define HALFBYTE_INLINE inline __attribute__((always_inline))

namespace halfbyte {
namespace {

struct F32x16 {
  __m256 lo, hi;
};
struct I32x16 {
  __m256i lo, hi;
};
struct U8x64 {
  __m256i lo, hi;
};

HALFBYTE_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
HALFBYTE_INLINE void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
HALFBYTE_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

HALFBYTE_INLINE F32x16 set_f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HALFBYTE_INLINE F32x16 load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HALFBYTE_INLINE void store_f32(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
HALFBYTE_INLINE F32x16 add_f32(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE F32x16 fma_f32(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HALFBYTE_INLINE __m256 max_abs(__m256 x, __m256 m) {
  // vmaxps gives its second operand when either is NaN.
  return _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), m);
}
HALFBYTE_INLINE F32x16 max_abs(F32x16 x, F32x16 m) { return {max_abs(x.lo, m.lo), max_abs(x.hi, m.hi)}; }
HALFBYTE_INLINE __m256i round_clamped(__m256 x, float lo, float hi) {
  x = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(lo)), _mm256_set1_ps(hi)));
}
HALFBYTE_INLINE I32x16 round_clamped(F32x16 x, float lo, float hi) {
  return {round_clamped(x.lo, lo, hi), round_clamped(x.hi, lo, hi)};
}

HALFBYTE_INLINE I32x16 set_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
HALFBYTE_INLINE I32x16 load_i32(const int32_t* p) { return {load_256(p), load_256(p + 8)}; }
HALFBYTE_INLINE void store_i32(int32_t* p, I32x16 x) {
  store_256(p, x.lo);
  store_256(p + 8, x.hi);
}
HALFBYTE_INLINE void store_low_bytes(int8_t* p, I32x16 x) {
  // All values are bytes already, so neither pack saturates; both work within 128-bit halves, hence the permutes.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
HALFBYTE_INLINE I32x16 load_u8_to_i32(const uint8_t* p) {
  const __m128i bytes = load_128(p);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
HALFBYTE_INLINE I32x16 add_i32(I32x16 a, I32x16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
HALFBYTE_INLINE I32x16 sub_i32(I32x16 a, I32x16 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
HALFBYTE_INLINE I32x16 mul_i32(I32x16 a, I32x16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
template <int Right, int Mask>
HALFBYTE_INLINE I32x16 shift_and_i32(I32x16 a) {
  const __m256i mask = _mm256_set1_epi32(Mask);
  return {_mm256_and_si256(_mm256_srli_epi32(a.lo, Right), mask),
          _mm256_and_si256(_mm256_srli_epi32(a.hi, Right), mask)};
}
HALFBYTE_INLINE F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
HALFBYTE_INLINE __m256 bf16_to_f32(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
HALFBYTE_INLINE F32x16 load_bf16(const uint16_t* p) { return {bf16_to_f32(load_128(p)), bf16_to_f32(load_128(p + 8))}; }
HALFBYTE_INLINE F32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}

HALFBYTE_INLINE U8x64 load_row(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
HALFBYTE_INLINE void store_row(uint8_t* p, U8x64 x) {
  store_256(p, x.lo);
  store_256(p + 32, x.hi);
}
HALFBYTE_INLINE U8x64 or_rows(U8x64 a, U8x64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int Right, int Mask>
HALFBYTE_INLINE __m256i shift_and(__m256i a) {
  if constexpr (Right > 0) a = _mm256_srli_epi32(a, Right);
  if constexpr (Right < 0) a = _mm256_slli_epi32(a, -Right);
  return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(Mask)));
}
template <int Right, int Mask>
HALFBYTE_INLINE U8x64 shift_and(U8x64 a) {
  return {shift_and<Right, Mask>(a.lo), shift_and<Right, Mask>(a.hi)};
}

template <int J>
HALFBYTE_INLINE __m256i byte_of_lanes(__m256i x) {
  if constexpr (J > 0) x = _mm256_srli_epi32(x, 8 * J);
  if constexpr (J < 3) x = _mm256_and_si256(x, _mm256_set1_epi32(0xff));
  return x;
}
template <int Bits, int J, int Center>
HALFBYTE_INLINE F32x16 code_to_float(U8x64 codes) {
  const __m256i center = _mm256_set1_epi32(Center);
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(byte_of_lanes<J>(codes.lo), center)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(byte_of_lanes<J>(codes.hi), center))};
}

// vpermps looks at the low 3 bits of each lane: one look-up in each half of the table, and bit 3 of the code, moved to
// the sign, picks between them.
struct CodeTable {
  __m256 low, high;
};
HALFBYTE_INLINE CodeTable load_table(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
template <int Bits, int J>
HALFBYTE_INLINE __m256 look_up(const CodeTable& table, __m256i codes) {
  const __m256i index = J == 0 ? codes : _mm256_srli_epi32(codes, 8 * J);
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  if constexpr (Bits <= 3) return low;
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 8 * J)));
}
template <int Bits, int J>
HALFBYTE_INLINE F32x16 look_up(const CodeTable& table, U8x64 codes) {
  return {look_up<Bits, J>(table, codes.lo), look_up<Bits, J>(table, codes.hi)};
}

HALFBYTE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace
}  // namespace halfbyte
