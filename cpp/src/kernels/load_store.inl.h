// Loads and stores of sixteen elements: float32, bfloat16, float16 and integer codes, as `Lanes` of float32.
// Narrowing rounds half to even. The hardware conversions and the loops of the scalar level give equal bits, NaN
// included: float16 keeps the sign and the top of the payload and becomes quiet (what VCVTPS2PH does), bfloat16 becomes
// 0x7fc0.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "xsimd_arch.h"

namespace halfbyte {
namespace {
namespace elementwise {

template <FloatType Type>
using Element = std::conditional_t<Type == FloatType::kFloat32, float, uint16_t>;

inline float float_from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_from_float(float value) {
  if (value != value) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A float16 is a float32 whose exponent is 112 smaller in its bias. Multiplying by 2^112 moves it, subnormals included;
// inf and NaN need the exponent set instead.
inline float float_from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {
    const uint32_t quiet = magnitude > 0x0f800000u ? 0x00400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000u | magnitude | quiet);
  }
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f) | sign);
}

inline uint16_t float16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24. Adding 0.5, whose last bit is 2^-24, rounds to one.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

template <FloatType Type>
inline float widen(Element<Type> value) {
  if constexpr (Type == FloatType::kFloat32) return value;
  if constexpr (Type == FloatType::kBFloat16) return float_from_bfloat16(value);
  if constexpr (Type == FloatType::kFloat16) return float_from_float16(value);
}

template <FloatType Type>
inline Element<Type> narrow(float value) {
  if constexpr (Type == FloatType::kFloat32) return value;
  if constexpr (Type == FloatType::kBFloat16) return bfloat16_from_float(value);
  if constexpr (Type == FloatType::kFloat16) return float16_from_float(value);
}

// Sixteen elements of a float type.
template <FloatType Type>
[[gnu::always_inline]] inline Lanes load_floats(const Element<Type>* x) {
  if constexpr (Type == FloatType::kFloat32) {
    return load(x);
  } else {
    Lanes lanes;
#if defined(__AVX512BW__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if constexpr (Type == FloatType::kFloat16) {
      lanes.batch[0] = _mm512_cvtph_ps(bits);
    } else {
      lanes.batch[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
#elif defined(__AVX2__)
    for (int b = 0; b < kBatches; ++b) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + b * kBatchLanes));
      if constexpr (Type == FloatType::kFloat16) {
        lanes.batch[b] = _mm256_cvtph_ps(bits);
      } else {
        lanes.batch[b] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      }
    }
#else
    float values[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) values[i] = widen<Type>(x[i]);
    lanes = load(values);
#endif
    return lanes;
  }
}

template <FloatType Type>
[[gnu::always_inline]] inline void store_floats(Element<Type>* y, const Lanes& lanes) {
  if constexpr (Type == FloatType::kFloat32) {
    store(y, lanes);
  } else {
#if defined(__AVX512BW__)
    __m256i out;
    if constexpr (Type == FloatType::kFloat16) {
      out = _mm512_cvtps_ph(lanes.batch[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m512 value = lanes.batch[0];
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i narrowed = _mm512_srli_epi32(rounded, 16);
      out = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(narrowed, nan, _mm512_set1_epi32(0x7fc0)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), out);
#elif defined(__AVX2__)
    for (int b = 0; b < kBatches; ++b) {
      const __m256 value = lanes.batch[b];
      __m128i out;
      if constexpr (Type == FloatType::kFloat16) {
        out = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {
        const __m256i bits = _mm256_castps_si256(value);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
        const __m256i narrowed = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
        out = _mm_packus_epi32(_mm256_castsi256_si128(narrowed), _mm256_extracti128_si256(narrowed, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + b * kBatchLanes), out);
    }
#else
    float values[kLanes];
    store(values, lanes);
    for (int64_t i = 0; i < kLanes; ++i) y[i] = narrow<Type>(values[i]);
#endif
  }
}

// Sixteen codes of int8_t, uint8_t or int32_t.
template <class Code>
[[gnu::always_inline]] inline Lanes load_codes(const Code* q) {
  if constexpr (sizeof(Code) == 4) {
    return load(q);
  } else {
    Lanes lanes;
#if defined(__AVX512BW__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    lanes.batch[0] =
        _mm512_cvtepi32_ps(std::is_signed_v<Code> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    for (int b = 0; b < kBatches; ++b) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + b * kBatchLanes));
      lanes.batch[b] =
          _mm256_cvtepi32_ps(std::is_signed_v<Code> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
    }
#else
    float values[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) values[i] = static_cast<float>(q[i]);
    lanes = load(values);
#endif
    return lanes;
  }
}

// Sixteen int32.
struct IntLanes {
  IntBatch batch[kBatches];
};

[[gnu::always_inline]] inline IntLanes operator+(const IntLanes& a, const IntLanes& b) {
  IntLanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = a.batch[i] + b.batch[i];
  return lanes;
}

// Half to even, for |v| < 2^22; NaN becomes `nan`.
[[gnu::always_inline]] inline IntLanes round_to_int(const Lanes& v, const IntLanes& nan) {
  IntLanes lanes;
#if defined(__AVX512BW__)
  const __m512 value = v.batch[0];
  const __mmask16 ordered = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  lanes.batch[0] = _mm512_mask_mov_epi32(nan.batch[0], ordered, _mm512_cvtps_epi32(value));
#elif defined(__AVX2__)
  for (int b = 0; b < kBatches; ++b) {
    const __m256 value = v.batch[b];
    const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
    lanes.batch[b] = _mm256_blendv_epi8(nan.batch[b], _mm256_cvtps_epi32(value), ordered);
  }
#else
  const Lanes rounded = round_small(replace_nan(v, v, broadcast(0.f)));
  for (int b = 0; b < kBatches; ++b) {
    const auto ordered = xsimd::batch_bool_cast<int32_t>(v.batch[b] == v.batch[b]);
    lanes.batch[b] = xsimd::select(ordered, xsimd::to_int(rounded.batch[b]), nan.batch[b]);
  }
#endif
  return lanes;
}

// Floats without a fraction, none of them NaN.
[[gnu::always_inline]] inline IntLanes to_int(const Lanes& v) {
  IntLanes lanes;
  for (int b = 0; b < kBatches; ++b) lanes.batch[b] = xsimd::to_int(v.batch[b]);
  return lanes;
}

// The lanes hold integers that the code type can hold.
template <class Code>
[[gnu::always_inline]] inline void store_codes(Code* q, const IntLanes& lanes) {
#if defined(__AVX512BW__)
  const __m512i codes = lanes.batch[0];
  if constexpr (sizeof(Code) == 4) {
    _mm512_storeu_si512(q, codes);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(codes));
  }
#elif defined(__AVX2__)
  const __m256i first = lanes.batch[0], second = lanes.batch[1];
  if constexpr (sizeof(Code) == 4) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + kBatchLanes), second);
  } else {
    // packs_epi32 works inside 128-bit halves, so its quadwords come out in the order 0, 2, 1, 3 of the lanes.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
    const __m256i bytes =
        _mm256_and_si256(words, _mm256_set1_epi16(0xff));  // then packus keeps signed bytes as they are
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q),
                     _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  }
#else
  int32_t values[kLanes];
  for (int b = 0; b < kBatches; ++b) lanes.batch[b].store_unaligned(values + b * kBatchLanes);
  for (int64_t i = 0; i < kLanes; ++i) q[i] = static_cast<Code>(values[i]);
#endif
}

// The same for floats without a fraction.
template <class Code>
[[gnu::always_inline]] inline void store_codes(Code* q, const Lanes& lanes) {
  store_codes(q, to_int(lanes));
}

// Four times sixteen, one after another: where a register holds 64 codes they are packed together.
template <class Code>
[[gnu::always_inline]] inline void store_codes(Code* q, const IntLanes (&four)[4]) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(Code) == 1) {
    // Packing works inside 128-bit quarters: byte quads come out as quarter 0 of all four, then quarter 1 of all four.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_packs_epi32(four[0].batch[0], four[1].batch[0]);
    const __m512i high = _mm512_packs_epi32(four[2].batch[0], four[3].batch[0]);
    const __m512i bytes = std::is_signed_v<Code> ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, bytes));
    return;
  }
#endif
  for (int64_t part = 0; part < 4; ++part) store_codes(q + part * kLanes, four[part]);
}

// Loads and stores of the `count` < kLanes elements at the end of a range go through a zero-filled buffer.
template <class T>
struct Partial {
  T values[kLanes] = {};
  Partial() = default;
  Partial(const T* from, int64_t count) { std::memcpy(values, from, static_cast<size_t>(count) * sizeof(T)); }
  void copy_to(T* to, int64_t count) const { std::memcpy(to, values, static_cast<size_t>(count) * sizeof(T)); }
};

// One step from 16 inputs to 16 outputs, over the whole of a range. Load and Store know the element types.
template <class In, class Out, class LoadIn, class StoreOut, class Step>
[[gnu::always_inline]] inline void transform(const In* in, Out* out, int64_t count, LoadIn load_in, StoreOut store_out,
                                             Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_out(out + i, step(load_in(in + i), i, kLanes));
  if (i == count) return;
  const Partial<In> input(in + i, count - i);
  Partial<Out> output;
  store_out(output.values, step(load_in(input.values), i, count - i));
  output.copy_to(out + i, count - i);
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
