// Primitives that only convolutions need, beside those of simd_<level>.h. Three forms: AVX-512, AVX2 (two registers a
// vector), and plain loops.
//
// A U8x64 is seen as 4 lanes of 16 bytes. Zipping four rows of 64 channels lane by lane gives 4 vectors of quads in
// *zip order*: vector j holds, in lane l, channels 16 l + 4 j ... + 3, 4 bytes of each. An I32x16 that such a vector
// makes has the same order; pack_codes and unzip undo it.
#pragma once
#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

#if defined(__AVX512BW__)

HALFBYTE_INLINE I32x16 load_s8_to_i32(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// larger: a > b ? a : b; smaller: a < b ? a : b. So NaN in b stays, and of zeros b is taken.
HALFBYTE_INLINE F32x16 larger(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
HALFBYTE_INLINE F32x16 smaller(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
HALFBYTE_INLINE F32x16 div_f32(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
HALFBYTE_INLINE U8x64 set_bytes(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
HALFBYTE_INLINE U8x64 xor_rows(U8x64 a, U8x64 b) { return _mm512_xor_si512(a, b); }
HALFBYTE_INLINE U8x64 zip_bytes_low(U8x64 a, U8x64 b) { return _mm512_unpacklo_epi8(a, b); }
HALFBYTE_INLINE U8x64 zip_bytes_high(U8x64 a, U8x64 b) { return _mm512_unpackhi_epi8(a, b); }
HALFBYTE_INLINE U8x64 zip_words_low(U8x64 a, U8x64 b) { return _mm512_unpacklo_epi16(a, b); }
HALFBYTE_INLINE U8x64 zip_words_high(U8x64 a, U8x64 b) { return _mm512_unpackhi_epi16(a, b); }
HALFBYTE_INLINE U8x64 pack_codes(const I32x16 (&q)[4]) {
  return _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
}
HALFBYTE_INLINE void unzip(F32x16 (&x)[4]) {
  const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x88), b = _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
  const __m512 c = _mm512_shuffle_f32x4(x[2], x[3], 0x88), d = _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88), x[1] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[2] = _mm512_shuffle_f32x4(a, c, 0xdd), x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

#elif defined(__AVX2__)

HALFBYTE_INLINE I32x16 load_s8_to_i32(const int8_t* p) {
  const __m128i bytes = load_128(p);
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
HALFBYTE_INLINE F32x16 larger(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE F32x16 smaller(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE F32x16 div_f32(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
HALFBYTE_INLINE U8x64 set_bytes(uint8_t x) {
  const __m256i v = _mm256_set1_epi8(static_cast<char>(x));
  return {v, v};
}
HALFBYTE_INLINE U8x64 xor_rows(U8x64 a, U8x64 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
HALFBYTE_INLINE U8x64 zip_bytes_low(U8x64 a, U8x64 b) {
  return {_mm256_unpacklo_epi8(a.lo, b.lo), _mm256_unpacklo_epi8(a.hi, b.hi)};
}
HALFBYTE_INLINE U8x64 zip_bytes_high(U8x64 a, U8x64 b) {
  return {_mm256_unpackhi_epi8(a.lo, b.lo), _mm256_unpackhi_epi8(a.hi, b.hi)};
}
HALFBYTE_INLINE U8x64 zip_words_low(U8x64 a, U8x64 b) {
  return {_mm256_unpacklo_epi16(a.lo, b.lo), _mm256_unpacklo_epi16(a.hi, b.hi)};
}
HALFBYTE_INLINE U8x64 zip_words_high(U8x64 a, U8x64 b) {
  return {_mm256_unpackhi_epi16(a.lo, b.lo), _mm256_unpackhi_epi16(a.hi, b.hi)};
}
HALFBYTE_INLINE __m256i pack_codes(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
HALFBYTE_INLINE U8x64 pack_codes(const I32x16 (&q)[4]) {
  return {pack_codes(q[0].lo, q[1].lo, q[2].lo, q[3].lo), pack_codes(q[0].hi, q[1].hi, q[2].hi, q[3].hi)};
}
HALFBYTE_INLINE void unzip(F32x16 (&x)[4]) {
  const F32x16 v[4] = {x[0], x[1], x[2], x[3]};
  x[0] = {_mm256_permute2f128_ps(v[0].lo, v[1].lo, 0x20), _mm256_permute2f128_ps(v[2].lo, v[3].lo, 0x20)};
  x[1] = {_mm256_permute2f128_ps(v[0].lo, v[1].lo, 0x31), _mm256_permute2f128_ps(v[2].lo, v[3].lo, 0x31)};
  x[2] = {_mm256_permute2f128_ps(v[0].hi, v[1].hi, 0x20), _mm256_permute2f128_ps(v[2].hi, v[3].hi, 0x20)};
  x[3] = {_mm256_permute2f128_ps(v[0].hi, v[1].hi, 0x31), _mm256_permute2f128_ps(v[2].hi, v[3].hi, 0x31)};
}

#else

HALFBYTE_INLINE I32x16 load_s8_to_i32(const int8_t* p) {
  return map_i32([&](int i) { return p[i]; });
}
HALFBYTE_INLINE F32x16 larger(F32x16 a, F32x16 b) {
  return map_f32([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
HALFBYTE_INLINE F32x16 smaller(F32x16 a, F32x16 b) {
  return map_f32([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
HALFBYTE_INLINE F32x16 div_f32(F32x16 a, F32x16 b) {
  return map_f32([&](int i) { return a.v[i] / b.v[i]; });
}
template <class F>
HALFBYTE_INLINE U8x64 map_bytes(F&& f) {
  U8x64 r;
  for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(f(i));
  return r;
}
HALFBYTE_INLINE U8x64 set_bytes(uint8_t x) {
  return map_bytes([&](int) { return x; });
}
HALFBYTE_INLINE U8x64 xor_rows(const U8x64& a, const U8x64& b) {
  return map_bytes([&](int i) { return a.v[i] ^ b.v[i]; });
}
// Elements of `Size` bytes from the half of each lane that begins at byte `Half`, of a and b in turn.
template <int Size, int Half>
HALFBYTE_INLINE U8x64 zip(const U8x64& a, const U8x64& b) {
  return map_bytes([&](int i) {
    const int at = (i & 48) + Half + (i & 15) / (2 * Size) * Size + i % Size;
    return i / Size % 2 == 0 ? a.v[at] : b.v[at];
  });
}
HALFBYTE_INLINE U8x64 zip_bytes_low(const U8x64& a, const U8x64& b) { return zip<1, 0>(a, b); }
HALFBYTE_INLINE U8x64 zip_bytes_high(const U8x64& a, const U8x64& b) { return zip<1, 8>(a, b); }
HALFBYTE_INLINE U8x64 zip_words_low(const U8x64& a, const U8x64& b) { return zip<2, 0>(a, b); }
HALFBYTE_INLINE U8x64 zip_words_high(const U8x64& a, const U8x64& b) { return zip<2, 8>(a, b); }
HALFBYTE_INLINE U8x64 pack_codes(const I32x16 (&q)[4]) {
  return map_bytes([&](int i) { return q[i % 16 / 4].v[i / 16 * 4 + i % 4]; });
}
HALFBYTE_INLINE void unzip(F32x16 (&x)[4]) {
  const F32x16 v[4] = {x[0], x[1], x[2], x[3]};
  for (int l = 0; l < 4; ++l) {
    x[l] = map_f32([&](int i) { return v[i / 4].v[4 * l + i % 4]; });
  }
}

#endif

// Sums of products of unsigned activations and signed weights, quad by quad: weights in the form that a level wants.
#if defined(__AVX512VNNI__)

using QuadWeights = __m512i;
HALFBYTE_INLINE QuadWeights load_quad_weights(const uint8_t* p) { return load_row(p); }
HALFBYTE_INLINE I32x16 dot_quads(I32x16 acc, U8x64 a, QuadWeights w) { return _mm512_dpbusd_epi32(acc, a, w); }

#elif defined(__AVXVNNI__)

using QuadWeights = U8x64;
HALFBYTE_INLINE QuadWeights load_quad_weights(const uint8_t* p) { return load_row(p); }
HALFBYTE_INLINE I32x16 dot_quads(I32x16 acc, U8x64 a, QuadWeights w) {
  return {_mm256_dpbusd_avx_epi32(acc.lo, a.lo, w.lo), _mm256_dpbusd_avx_epi32(acc.hi, a.hi, w.hi)};
}

#elif defined(__AVX2__)

// By 16-bit products of even and odd bytes, whose sums fit in 32 bits: vpmaddubsw would saturate.
struct QuadWeights {
  U8x64 even, odd;
};
HALFBYTE_INLINE QuadWeights load_quad_weights(const uint8_t* p) {
  const U8x64 w = load_row(p);
  return {{_mm256_srai_epi16(_mm256_slli_epi16(w.lo, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(w.hi, 8), 8)},
          {_mm256_srai_epi16(w.lo, 8), _mm256_srai_epi16(w.hi, 8)}};
}
HALFBYTE_INLINE __m256i dot_quads(__m256i acc, __m256i a, __m256i even, __m256i odd) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(0xff)), even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(a, 8), odd));
}
HALFBYTE_INLINE I32x16 dot_quads(I32x16 acc, U8x64 a, const QuadWeights& w) {
  return {dot_quads(acc.lo, a.lo, w.even.lo, w.odd.lo), dot_quads(acc.hi, a.hi, w.even.hi, w.odd.hi)};
}

#else

using QuadWeights = U8x64;
HALFBYTE_INLINE QuadWeights load_quad_weights(const uint8_t* p) { return load_row(p); }
HALFBYTE_INLINE I32x16 dot_quads(I32x16 acc, const U8x64& a, const QuadWeights& w) {
  return map_i32([&](int i) {
    int32_t sum = acc.v[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += a.v[j] * static_cast<int8_t>(w.v[j]);
    return sum;
  });
}

#endif

// How a tile of conv_rows multiplies: a row of 64 codes of a panel with a quad of activations.
template <int Range>
struct CodesTimesActivations {  // unsigned codes, signed activations; Range bounds the codes, as in matmul_int8.inl.h
  static constexpr bool kUnsignedActivations = false;
  using Row = DotRow<Range>;
  using Quad = DotQuad<Range>;
  static HALFBYTE_INLINE Row row(const uint8_t* p) { return dot_row<Range>(load_row(p)); }
  static HALFBYTE_INLINE Quad quad(const int8_t* p) { return load_quad<Range>(p); }
  static HALFBYTE_INLINE I32x16 dot(I32x16 acc, const Row& w, const Quad& a) { return halfbyte::dot<Range>(acc, w, a); }
};

// Where making activations unsigned (a + 128) costs little, codes of center 128 are made signed: only sums of weights,
// known once a column, have to be taken off then, and none of activations.
#if defined(__AVX512VNNI__)
#define HALFBYTE_UNSIGNED_ACTIVATIONS
struct ActivationsTimesWeights {
  static constexpr bool kUnsignedActivations = true;
  using Row = __m512i;
  using Quad = __m512i;
  static HALFBYTE_INLINE Row row(const uint8_t* p) { return xor_rows(load_row(p), set_bytes(0x80)); }
  static HALFBYTE_INLINE Quad quad(const int8_t* p) { return xor_rows(load_quad<8>(p), set_bytes(0x80)); }
  static HALFBYTE_INLINE I32x16 dot(I32x16 acc, Row w, Quad a) { return _mm512_dpbusd_epi32(acc, a, w); }
};
#elif defined(__AVXVNNI__)
#define HALFBYTE_UNSIGNED_ACTIVATIONS
struct ActivationsTimesWeights {
  static constexpr bool kUnsignedActivations = true;
  using Row = U8x64;
  using Quad = __m256i;
  static HALFBYTE_INLINE Row row(const uint8_t* p) { return xor_rows(load_row(p), set_bytes(0x80)); }
  static HALFBYTE_INLINE Quad quad(const int8_t* p) {
    return _mm256_xor_si256(load_quad<8>(p), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static HALFBYTE_INLINE I32x16 dot(I32x16 acc, const Row& w, Quad a) {
    return {_mm256_dpbusd_avx_epi32(acc.lo, a, w.lo), _mm256_dpbusd_avx_epi32(acc.hi, a, w.hi)};
  }
};
#endif

// 4 rows of 64 bytes to 4 vectors of quads in zip order, one after another at `to`.
HALFBYTE_INLINE void store_zipped(const U8x64 (&rows)[4], uint8_t* to) {
  const U8x64 a = zip_bytes_low(rows[0], rows[1]), b = zip_bytes_high(rows[0], rows[1]);
  const U8x64 c = zip_bytes_low(rows[2], rows[3]), d = zip_bytes_high(rows[2], rows[3]);
  store_row(to, zip_words_low(a, c));
  store_row(to + 64, zip_words_high(a, c));
  store_row(to + 128, zip_words_low(b, d));
  store_row(to + 192, zip_words_high(b, d));
}

}  // namespace
}  // namespace halfbyte
