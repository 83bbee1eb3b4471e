// Histogram: bin numbers of sixteen values at once, then sixteen increments. Bound by the increments (a load, an add
// and a store each), one to two a cycle.
#pragma once
#include "elementwise.inl.h"
#include "halfbyte/histogram.h"

namespace halfbyte {
namespace {
namespace elementwise {

template <FloatType Type>
int64_t count_histogram(const Element<Type>* x, int64_t count, const HistogramRange& range, uint32_t* copies) {
  const Lanes low = broadcast(range.low), factor = broadcast(range.bins_per_unit), zero = broadcast(0.f);
  const Lanes last = broadcast(static_cast<float>(range.bins - 1));
  int64_t nans = 0;
  const auto add = [&](const Lanes& value, int64_t values) {
    // max(0, NaN) is 0. Truncating is rounding down where nothing is negative.
    const Lanes position = min(max(zero, (value - low) * factor), last);
    alignas(64) int32_t bin[kLanes];
    for (int b = 0; b < kBatches; ++b) xsimd::to_int(position.batch[b]).store_aligned(bin + b * kBatchLanes);
    nans += std::popcount(~equal_bits(value, value) & ((1u << values) - 1u));
    for (int64_t lane = 0; lane < values; ++lane) ++copies[lane % kHistogramCopies * range.bins + bin[lane]];
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add(load_floats<Type>(x + i), kLanes);
  if (i < count) add(load_floats<Type>(Partial<Element<Type>>(x + i, count - i).values), count - i);
  return nans;
}

}  // namespace elementwise

constexpr HistogramKernels histogram_kernels() {
  namespace e = elementwise;
  return {.count = [](const void* x, FloatType type, int64_t count, const HistogramRange& range, uint32_t* copies) {
    int64_t nans = 0;
    e::with_type(type, [&]<FloatType T>() {
      nans = e::count_histogram<T>(static_cast<const e::Element<T>*>(x), count, range, copies);
    });
    return nans;
  }};
}

}  // namespace
}  // namespace halfbyte
