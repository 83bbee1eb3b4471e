// Histogram: bin numbers of sixteen values at once, then sixteen increments. Bound by the increments (a load, an add
// and a store each), one to two a cycle.
#pragma once
#include "elementwise.inl.h"
#include "halfbyte/histogram.h"

namespace halfbyte {
namespace {
namespace elementwise {

// Values whose bins are found before any is counted: taken from a vector lane by lane, a bin costs more than from
// memory.
constexpr int64_t kBinBlock = 512;

template <FloatType Type>
int64_t count_histogram(const Element<Type>* x, int64_t count, const HistogramRange& range, uint32_t* copies) {
  const Lanes low = broadcast(range.low), factor = broadcast(range.bins_per_unit), zero = broadcast(0.f);
  const Lanes last = broadcast(static_cast<float>(range.bins - 1));
  alignas(64) uint32_t bin[kBinBlock];
  int64_t nans = 0;
  const auto find_bins = [&](const Lanes& value, int64_t at, int64_t values) {
    // max(0, NaN) is 0. Truncating is rounding down where nothing is negative.
    const Lanes position = min(max(zero, (value - low) * factor), last);
    for (int b = 0; b < kBatches; ++b) {
      xsimd::to_int(position.batch[b]).store_aligned(reinterpret_cast<int32_t*>(bin) + at + b * kBatchLanes);
    }
    nans += std::popcount(~equal_bits(value, value) & ((1u << values) - 1u));
  };
  for (int64_t begin = 0; begin < count; begin += kBinBlock) {
    const int64_t length = std::min(kBinBlock, count - begin), whole = length / kLanes * kLanes;
    const Element<Type>* block = x + begin;
    for (int64_t i = 0; i < whole; i += kLanes) find_bins(load_floats<Type>(block + i), i, kLanes);
    if (whole < length) {
      find_bins(load_floats<Type>(Partial<Element<Type>>(block + whole, length - whole).values), whole, length - whole);
    }
    int64_t i = 0;
    for (; i + kHistogramCopies <= length; i += kHistogramCopies) {
      for (int64_t copy = 0; copy < kHistogramCopies; ++copy) ++copies[copy * range.bins + bin[i + copy]];
    }
    for (; i < length; ++i) ++copies[bin[i]];
  }
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
