// Lets the avx512vnni level compile for AVX2, its AVX-512 intrinsics done by SIMDe: the compiler includes this file
// before it. A check of arithmetic on any CPU; detection and speed it does not see.
//
// __m512* become SIMDe's vectors of the same size, and the level's feature macros are defined by hand *after* SIMDe has
// seen what the compiler really targets. An intrinsic that is missing here is a compile error ("target specific option
// mismatch"), never a silent AVX-512 instruction; ctest looks for those all the same.
#pragma once
#include <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>
#include <cstring>

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512d simde__m512d
#define __AVX512F__ 1
#define __AVX512CD__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1

namespace halfbyte {
namespace {
namespace emulation {

template <class Half, class Whole>
Half half(const Whole& whole, int which) {
  Half halves[2];
  static_assert(sizeof(halves) == sizeof(whole));
  std::memcpy(halves, &whole, sizeof(halves));
  return halves[which];
}

template <class Whole, class Half>
Whole join(const Half& low, const Half& high) {
  const Half halves[2] = {low, high};
  Whole whole;
  static_assert(sizeof(halves) == sizeof(whole));
  std::memcpy(&whole, halves, sizeof(halves));
  return whole;
}

[[maybe_unused]] __m512 cvtepi32_ps(__m512i v) {
  return join<__m512>(_mm256_cvtepi32_ps(half<__m256i>(v, 0)), _mm256_cvtepi32_ps(half<__m256i>(v, 1)));
}

[[maybe_unused]] __m512i cvtps_epi32(__m512 v) {
  return join<__m512i>(_mm256_cvtps_epi32(half<__m256>(v, 0)), _mm256_cvtps_epi32(half<__m256>(v, 1)));
}

[[maybe_unused]] __m512i cvttps_epi32(__m512 v) {
  return join<__m512i>(_mm256_cvttps_epi32(half<__m256>(v, 0)), _mm256_cvttps_epi32(half<__m256>(v, 1)));
}

[[maybe_unused]] __m512i cvtepi8_epi32(__m128i v) {
  return join<__m512i>(_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)));
}

[[maybe_unused]] __m512i cvtepu8_epi32(__m128i v) {
  return join<__m512i>(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}

[[maybe_unused]] __m512i cvtepu16_epi32(__m256i v) {
  return join<__m512i>(_mm256_cvtepu16_epi32(half<__m128i>(v, 0)), _mm256_cvtepu16_epi32(half<__m128i>(v, 1)));
}

[[maybe_unused]] __m512 cvtph_ps(__m256i v) {
  return join<__m512>(_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1)));
}

template <int Rounding>
__m256i cvtps_ph(__m512 v) {
  return join<__m256i>(_mm256_cvtps_ph(half<__m256>(v, 0), Rounding), _mm256_cvtps_ph(half<__m256>(v, 1), Rounding));
}

// The narrowing conversions keep the low part of each element.
template <class Element, class Narrow>
Narrow truncate(const __m512i& v) {
  int32_t wide[16];
  std::memcpy(wide, &v, sizeof(wide));
  Element elements[16];
  for (int i = 0; i < 16; ++i) elements[i] = static_cast<Element>(wide[i]);
  Narrow narrow;
  static_assert(sizeof(narrow) == sizeof(elements));
  std::memcpy(&narrow, elements, sizeof(narrow));
  return narrow;
}

[[maybe_unused]] __m256i cvtepi32_epi16(__m512i v) { return truncate<int16_t, __m256i>(v); }
[[maybe_unused]] __m128i cvtepi32_epi8(__m512i v) { return truncate<int8_t, __m128i>(v); }

// VSHUFF32X4: two quarters of a, then two of b.
[[maybe_unused]] __m512 shuffle_f32x4(__m512 a, __m512 b, int selected) {
  __m128 from[2][4], to[4];
  std::memcpy(from[0], &a, sizeof(a));
  std::memcpy(from[1], &b, sizeof(b));
  for (int i = 0; i < 4; ++i) to[i] = from[i / 2][(selected >> (2 * i)) & 3];
  __m512 result;
  std::memcpy(&result, to, sizeof(result));
  return result;
}

// VPCMPD and VPCMPUD: the predicate counts EQ, LT, LE, FALSE, NE, NLT, NLE, TRUE.
template <class Element>
__mmask16 compare(const __m512i& a, const __m512i& b, int predicate) {
  Element left[16], right[16];
  std::memcpy(left, &a, sizeof(left));
  std::memcpy(right, &b, sizeof(right));
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool less = left[i] < right[i], equal = left[i] == right[i];
    const bool holds[8] = {equal, less, less || equal, false, !equal, !less, !less && !equal, true};
    mask |= static_cast<unsigned>(holds[predicate]) << i;
  }
  return static_cast<__mmask16>(mask);
}

}  // namespace emulation
}  // namespace
}  // namespace halfbyte

// Missing in SIMDe 0.7.4.
#define _mm512_cvtepi32_ps halfbyte::emulation::cvtepi32_ps
#define _mm512_cvtps_epi32 halfbyte::emulation::cvtps_epi32
#define _mm512_cvttps_epi32 halfbyte::emulation::cvttps_epi32
#define _mm512_cvtepi8_epi32 halfbyte::emulation::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 halfbyte::emulation::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 halfbyte::emulation::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 halfbyte::emulation::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 halfbyte::emulation::cvtepi32_epi8
#define _mm512_cmp_epi32_mask halfbyte::emulation::compare<int32_t>
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 halfbyte::emulation::shuffle_f32x4
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps halfbyte::emulation::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(v, rounding) halfbyte::emulation::cvtps_ph<rounding>(v)
// SIMDe's macro of two arguments stumbles over the comma of a template argument list.
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 simde_mm512_permutexvar_epi32
