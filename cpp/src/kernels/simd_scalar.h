// The scalar level's primitives, and the list every simd_<level>.h provides. A vector always spans one panel: 16
// outputs.
//
//   F32x16, I32x16    16 floats, 16 int32
//   U8x64             one 64-byte row of the tiles layout: 16 outputs x 4 inputs (a quad), one byte each
//   DotRow, DotQuad   operands of dot(): a row of codes, and 4 activations repeated for every output
//   kTileRows, kTilePanels   register tile of the matrix products: rows of x by panels of w
//   kDirectAccumulators      rows x panels of a float tile that converts codes in registers (1, 2 or 4 panels)
//   kSplitBelow       tiles with fewer accumulators than this get a second set, to hide the latency of dot()
//   direct_rows(bits) up to this many rows, codes are unpacked in registers instead of into a block
//   float_direct_rows(bits)  the same for float activations
//   CodeTable         sixteen floats that look_up picks from by 4-bit codes
//   narrow_quads(bits)  how many quads of codes below 2^bits are summed in 16 bits before they are widened. A level
//                     where it may be more than 1 also defines HALFBYTE_NARROW_SUMS, kNarrowTileRows, NarrowSums,
//                     no_narrow_sums, dot_narrow and widen
//   load_*, store_*, set_*, add_*, fma, dot, shift_and, code_to_float<Bits, J>, ... as below
//
// Every function gives the same bits on every level. Integers wrap.
#pragma once
#include <cmath>
#include <cstring>

#include "halfbyte/types.h"

// The compiler decides here: forcing it would only make the code large.
#define HALFBYTE_INLINE inline

namespace halfbyte {
namespace {

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};
struct U8x64 {
  uint8_t v[64];
};

constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;
constexpr int kDirectAccumulators = 1;
constexpr int kSplitBelow = 0;
constexpr int direct_rows(int) { return 0; }  // unpacking costs little beside scalar products
constexpr int float_direct_rows(int bits) { return direct_rows(bits); }
constexpr int narrow_quads(int) { return 1; }

template <class F>
HALFBYTE_INLINE F32x16 map_f32(F&& f) {
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
HALFBYTE_INLINE I32x16 map_i32(F&& f) {
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}
HALFBYTE_INLINE int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }

HALFBYTE_INLINE F32x16 set_f32(float x) {
  return map_f32([&](int) { return x; });
}
HALFBYTE_INLINE F32x16 load_f32(const float* p) {
  return map_f32([&](int i) { return p[i]; });
}
HALFBYTE_INLINE void store_f32(float* p, F32x16 x) { std::memcpy(p, x.v, sizeof(x.v)); }
HALFBYTE_INLINE F32x16 add_f32(F32x16 a, F32x16 b) {
  return map_f32([&](int i) { return a.v[i] + b.v[i]; });
}
HALFBYTE_INLINE F32x16 mul_f32(F32x16 a, F32x16 b) {
  return map_f32([&](int i) { return a.v[i] * b.v[i]; });
}
// a * b + c, rounded once
HALFBYTE_INLINE F32x16 fma_f32(F32x16 a, F32x16 b, F32x16 c) {
  return map_f32([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// max(|x|, m), and m where x is NaN
HALFBYTE_INLINE F32x16 max_abs(F32x16 x, F32x16 m) {
  return map_f32([&](int i) { return std::fabs(x.v[i]) > m.v[i] ? std::fabs(x.v[i]) : m.v[i]; });
}
// x limited to [lo, hi], 0 where x is NaN; then rounded half to even. |lo|, |hi| < 2^22.
HALFBYTE_INLINE I32x16 round_clamped(F32x16 x, float lo, float hi) {
  return map_i32([&](int i) {
    float v = x.v[i] == x.v[i] ? x.v[i] : 0.0f;
    v = v < lo ? lo : v;
    v = v > hi ? hi : v;
    // Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded half to even, and the difference is exact.
    return static_cast<int32_t>((v + 12582912.0f) - 12582912.0f);
  });
}

HALFBYTE_INLINE I32x16 set_i32(int32_t x) {
  return map_i32([&](int) { return x; });
}
HALFBYTE_INLINE I32x16 load_i32(const int32_t* p) {
  return map_i32([&](int i) { return p[i]; });
}
HALFBYTE_INLINE void store_i32(int32_t* p, I32x16 x) { std::memcpy(p, x.v, sizeof(x.v)); }
HALFBYTE_INLINE void store_low_bytes(int8_t* p, I32x16 x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
HALFBYTE_INLINE I32x16 load_u8_to_i32(const uint8_t* p) {
  return map_i32([&](int i) { return p[i]; });
}
HALFBYTE_INLINE I32x16 add_i32(I32x16 a, I32x16 b) {
  return map_i32([&](int i) { return wrap(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
HALFBYTE_INLINE I32x16 sub_i32(I32x16 a, I32x16 b) {
  return map_i32([&](int i) { return wrap(uint32_t(a.v[i]) - uint32_t(b.v[i])); });
}
HALFBYTE_INLINE I32x16 mul_i32(I32x16 a, I32x16 b) {
  return map_i32([&](int i) { return wrap(uint32_t(a.v[i]) * uint32_t(b.v[i])); });
}
// (a >> Right) & Mask of integers that are not negative
template <int Right, int Mask>
HALFBYTE_INLINE I32x16 shift_and_i32(I32x16 a) {
  return map_i32([&](int i) { return (a.v[i] >> Right) & Mask; });
}
HALFBYTE_INLINE F32x16 to_float(I32x16 a) {
  return map_f32([&](int i) { return static_cast<float>(a.v[i]); });
}
HALFBYTE_INLINE F32x16 load_bf16(const uint16_t* p) {
  return map_f32([&](int i) {
    const uint32_t bits = uint32_t(p[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  });
}
HALFBYTE_INLINE F32x16 load_f16(const uint16_t* p) {
  return map_f32([&](int i) {
    const uint32_t h = p[i];
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    float x;
    if (exponent == 0) {
      x = static_cast<float>(mantissa) * 0x1p-24f;  // zero or subnormal: exact in float32
      return sign ? -x : x;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  });
}

HALFBYTE_INLINE U8x64 load_row(const uint8_t* p) {
  U8x64 r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
HALFBYTE_INLINE void store_row(uint8_t* p, U8x64 x) { std::memcpy(p, x.v, sizeof(x.v)); }
HALFBYTE_INLINE U8x64 or_rows(U8x64 a, U8x64 b) {
  U8x64 r;
  for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] | b.v[i];
  return r;
}
// Each byte shifted right by `Right` (left if negative), then masked: the mask drops what other bytes shift in.
template <int Right, int Mask>
HALFBYTE_INLINE U8x64 shift_and(U8x64 a) {
  U8x64 r;
  for (int i = 0; i < 64; ++i) {
    r.v[i] = static_cast<uint8_t>((Right >= 0 ? a.v[i] >> (Right & 7) : a.v[i] << (-Right & 7)) & Mask);
  }
  return r;
}

template <int Bits>
using DotRow = U8x64;
template <int Bits>
struct DotQuad {
  int8_t v[4];
};
template <int Bits>
HALFBYTE_INLINE DotRow<Bits> dot_row(U8x64 codes) {
  return codes;
}
template <int Bits>
HALFBYTE_INLINE DotQuad<Bits> load_quad(const int8_t* p) {
  return {{p[0], p[1], p[2], p[3]}};
}
// acc + for each output the sum over the quad of code * activation; codes are below 2^Bits.
template <int Bits>
HALFBYTE_INLINE I32x16 dot(I32x16 acc, const U8x64& w, const DotQuad<Bits>& a) {
  return map_i32([&](int i) {
    return acc.v[i] + w.v[4 * i] * a.v[0] + w.v[4 * i + 1] * a.v[1] + w.v[4 * i + 2] * a.v[2] + w.v[4 * i + 3] * a.v[3];
  });
}

// float(code - Center) of input J of a quad, for every output; codes are below 2^Bits.
template <int Bits, int J, int Center>
HALFBYTE_INLINE F32x16 code_to_float(U8x64 codes) {
  return map_f32([&](int i) { return static_cast<float>(codes.v[4 * i + J] - Center); });
}

// table[code] of input J of a quad, for every output; codes are below 2^Bits, Bits <= 4.
struct CodeTable {
  float v[16];
};
HALFBYTE_INLINE CodeTable load_table(const float* p) {
  CodeTable table;
  std::memcpy(table.v, p, sizeof(table.v));
  return table;
}
template <int Bits, int J>
HALFBYTE_INLINE F32x16 look_up(const CodeTable& table, U8x64 codes) {
  return map_f32([&](int i) { return table.v[codes.v[4 * i + J]]; });
}

HALFBYTE_INLINE void prefetch(const void*) {}

}  // namespace
}  // namespace halfbyte
