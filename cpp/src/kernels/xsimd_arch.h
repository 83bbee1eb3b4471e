// Sixteen float lanes on every level, over the xsimd architecture that the level's flags select. Kernels written in
// terms of `Lanes` do the same operations in the same order everywhere, which is what makes the levels equal bit for
// bit. The scalar level uses what every x86-64 CPU has, SSE2; other machines get xsimd's emulated architecture: plain
// loops.
#pragma once
#if !defined(__SSE2__)
#define XSIMD_WITH_EMULATED 1
#endif
#include <xsimd/xsimd.hpp>

#include "halfbyte/elementwise.h"

static_assert(XSIMD_VERSION_MAJOR >= 13, "xsimd 13 or later");

namespace halfbyte {
namespace {
namespace elementwise {

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
using Arch = xsimd::avx512bw;
#elif defined(__AVX2__)
using Arch = xsimd::avx2;
#elif defined(__SSE2__)
using Arch = xsimd::sse2;
#else
using Arch = xsimd::emulated<512>;
#endif

using FloatBatch = xsimd::batch<float, Arch>;
using IntBatch = xsimd::batch<int32_t, Arch>;
constexpr int64_t kLanes = kElementLanes;
constexpr int kBatchLanes = static_cast<int>(FloatBatch::size);
constexpr int kBatches = static_cast<int>(kLanes) / kBatchLanes;

struct Lanes {
  FloatBatch batch[kBatches];
};

[[gnu::always_inline]] inline Lanes broadcast(float value) {
  Lanes lanes;
  for (int b = 0; b < kBatches; ++b) lanes.batch[b] = FloatBatch(value);
  return lanes;
}

[[gnu::always_inline]] inline Lanes load(const float* values) {
  Lanes lanes;
  for (int b = 0; b < kBatches; ++b) lanes.batch[b] = FloatBatch::load_unaligned(values + b * kBatchLanes);
  return lanes;
}

[[gnu::always_inline]] inline void store(float* values, const Lanes& lanes) {
  for (int b = 0; b < kBatches; ++b) lanes.batch[b].store_unaligned(values + b * kBatchLanes);
}

// int32 codes: |code| < 2^24 converts exactly.
[[gnu::always_inline]] inline Lanes load(const int32_t* codes) {
  Lanes lanes;
  for (int b = 0; b < kBatches; ++b) {
    lanes.batch[b] = xsimd::to_float(IntBatch::load_unaligned(codes + b * kBatchLanes));
  }
  return lanes;
}

[[gnu::always_inline]] inline Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = a.batch[i] + b.batch[i];
  return lanes;
}

[[gnu::always_inline]] inline Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = a.batch[i] - b.batch[i];
  return lanes;
}

[[gnu::always_inline]] inline Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = a.batch[i] * b.batch[i];
  return lanes;
}

// Like std::min and std::max: the first operand where either is NaN.
[[gnu::always_inline]] inline Lanes min(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = xsimd::min(a.batch[i], b.batch[i]);
  return lanes;
}

[[gnu::always_inline]] inline Lanes max(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = xsimd::max(a.batch[i], b.batch[i]);
  return lanes;
}

[[gnu::always_inline]] inline Lanes abs(const Lanes& a) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = xsimd::abs(a.batch[i]);
  return lanes;
}

// NaN stays NaN.
[[gnu::always_inline]] inline Lanes clamp(const Lanes& v, const Lanes& lowest, const Lanes& highest) {
  return min(max(v, lowest), highest);
}

// Half to even, for |v| < 2^22: 1.5 * 2^23 has no fraction bits, so the sum is rounded to an integer and the difference
// is exact. Never gives -0. No SSE4.1 needed, and every level rounds alike.
[[gnu::always_inline]] inline Lanes round_small(const Lanes& v) {
  const Lanes magic = broadcast(12582912.f);
  return (v + magic) - magic;
}

// Bit i is set where a == b in lane i; NaN equals nothing.
[[gnu::always_inline]] inline uint32_t equal_bits(const Lanes& a, const Lanes& b) {
  uint32_t bits = 0;
  for (int i = 0; i < kBatches; ++i) {
    bits |= static_cast<uint32_t>((a.batch[i] == b.batch[i]).mask()) << (i * kBatchLanes);
  }
  return bits;
}

// `v` where a == a, else `otherwise`: what NaN lanes of `a` become.
[[gnu::always_inline]] inline Lanes replace_nan(const Lanes& a, const Lanes& v, const Lanes& otherwise) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) {
    lanes.batch[i] = xsimd::select(a.batch[i] == a.batch[i], v.batch[i], otherwise.batch[i]);
  }
  return lanes;
}

// `v` where bit i of `bits` is set, else +0.
[[gnu::always_inline]] inline Lanes keep(const Lanes& v, uint32_t bits) {
  alignas(64) static constexpr int32_t kBit[kLanes] = {1 << 0,  1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                                       1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                                       1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const IntBatch all(static_cast<int32_t>(bits));
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) {
    const IntBatch bit = IntBatch::load_aligned(kBit + i * kBatchLanes);
    lanes.batch[i] = xsimd::select(xsimd::batch_bool_cast<float>((all & bit) == bit), v.batch[i], FloatBatch(0.f));
  }
  return lanes;
}

// The sum of the lanes in one fixed order: halves added pairwise.
[[gnu::always_inline]] inline float sum(const Lanes& lanes) {
#if defined(__SSE2__)
#if defined(__AVX512BW__)
  const __m512 all = lanes.batch[0];
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m256 eight = lanes.batch[0] + lanes.batch[1];
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const __m128 four = (lanes.batch[0] + lanes.batch[2]) + (lanes.batch[1] + lanes.batch[3]);
#endif
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float values[kLanes];
  store(values, lanes);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
#endif
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
