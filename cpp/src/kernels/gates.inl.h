// sigmoid and tanh over sixteen lanes: only + - * / and exact operations, in one order, so the levels give equal bits.
//
// exp(x), |x| <= 87: with n = round(x / ln 2), r = x - n ln 2 in two parts of ln 2 (the first has 12 bits, so n times
// it is exact), the Cephes polynomial of degree 7 gives e^r, |r| <= ln(2)/2, and 2^n is built from its exponent bits.
// Largest errors against float64 over every float32 (cpp/tests/test_recurrent.cpp checks them over a grid):
// sigmoid 2.5 ulp where it is at least 2^-125, tanh 2.5 ulp; both are below 1.6e-7 absolutely.
#pragma once
#include "xsimd_arch.h"

namespace halfbyte {
namespace {
namespace elementwise {

[[gnu::always_inline]] inline Lanes operator/(const Lanes& a, const Lanes& b) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = a.batch[i] / b.batch[i];
  return lanes;
}

// a < b ? v : w; false where a or b is NaN.
[[gnu::always_inline]] inline Lanes select_less(const Lanes& a, const Lanes& b, const Lanes& v, const Lanes& w) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = xsimd::select(a.batch[i] < b.batch[i], v.batch[i], w.batch[i]);
  return lanes;
}

// 2^n of an integer n, |n| <= 126. Adding 1.5 * 2^23 (bits 0x4b400000) leaves n in the low bits of the sum.
[[gnu::always_inline]] inline Lanes power_of_two(const Lanes& n) {
  const Lanes shifted = n + broadcast(12582912.f);
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) {
    const IntBatch exponent = xsimd::bitwise_cast<int32_t>(shifted.batch[i]) - IntBatch(0x4b400000 - 127);
    lanes.batch[i] = xsimd::bitwise_cast<float>(exponent << 23);
  }
  return lanes;
}

// v * x + c, rounded twice.
[[gnu::always_inline]] inline Lanes horner(const Lanes& v, const Lanes& x, float c) { return v * x + broadcast(c); }

// e^x of x clamped to [-87, 87], where it is a normal number; NaN stays NaN.
[[gnu::always_inline]] inline Lanes exponential(const Lanes& x) {
  const Lanes v = clamp(x, broadcast(-87.f), broadcast(87.f));
  const Lanes n = round_small(v * broadcast(1.44269504f));
  const Lanes r = (v - n * broadcast(0.693359375f)) - n * broadcast(-2.12194440e-4f);
  Lanes p = broadcast(1.9875691500e-4f);
  p = horner(p, r, 1.3981999507e-3f);
  p = horner(p, r, 8.3334519073e-3f);
  p = horner(p, r, 4.1665795894e-2f);
  p = horner(p, r, 1.6666665459e-1f);
  p = horner(p, r, 5.0000001201e-1f);
  return (p * (r * r) + r + broadcast(1.f)) * power_of_two(n);
}

[[gnu::always_inline]] inline Lanes sigmoid(const Lanes& x) {
  const Lanes one = broadcast(1.f);
  return one / (one + exponential(broadcast(0.f) - x));
}

// 1 - 2 / (e^2|x| + 1) loses digits where tanh is small: below 0.625 the odd Cephes polynomial of degree 11 stands in.
[[gnu::always_inline]] inline Lanes tanh(const Lanes& x) {
  const Lanes zero = broadcast(0.f), one = broadcast(1.f), two = broadcast(2.f);
  const Lanes size = abs(x), square = x * x;
  Lanes p = broadcast(-5.70498872745e-3f);
  p = horner(p, square, 2.06390887954e-2f);
  p = horner(p, square, -5.37397155531e-2f);
  p = horner(p, square, 1.33314422036e-1f);
  p = horner(p, square, -3.33332819422e-1f);
  const Lanes small = p * square * x + x;
  const Lanes large = one - two / (exponential(two * size) + one);
  return select_less(size, broadcast(0.625f), small, select_less(x, zero, zero - large, large));
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
