// Counting values into equal bins: bin = clamp(floor((x - low) * bins_per_unit), 0, bins - 1) in float32, so values
// outside the range, infinities included, are counted in the end bins.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte {

// Copies of the bins that neighbouring values count into: a value that falls into the bin of its neighbour would wait
// for the neighbour's store. Four copies of 2,048 bins are as large as the smallest first-level cache.
constexpr int64_t kHistogramCopies = 4;
constexpr int64_t kMaxHistogramBins = 1 << 24;            // every index is exact in float32
constexpr int64_t kMaxHistogramCount = int64_t{1} << 31;  // elements a call may add to its counts

struct HistogramRange {
  float low, bins_per_unit;  // bins / (high - low)
  int64_t bins;
};

struct HistogramKernels {
  // Adds x[0:count] to copies[kHistogramCopies][bins]; the histogram is the sum of the copies. Returns how many values
  // were NaN; those are counted in bin 0.
  int64_t (*count)(const void* x, FloatType type, int64_t count, const HistogramRange& range, uint32_t* copies);
};

}  // namespace halfbyte
