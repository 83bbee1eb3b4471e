// The range of codes that loses least of what a histogram holds: sum(count * (x_hat - x)^2), values spread evenly
// within each bin.
#pragma once
#include <cstdint>

namespace halfbyte {

struct HistogramView {
  const double* counts;
  int64_t bins;
  double low, width;  // lower end of the first bin; width of each
};

struct CodeGrid {
  int64_t qmin, qmax;
  bool symmetric;  // zero is code 0 and the range is -T to T
};

struct SearchedRange {
  double low, high, mean_squared_error;
};

// The best range within the bins that hold anything, widened to contain zero. `moments` is scratch of 3 * (bins + 1).
SearchedRange search_histogram_range(const HistogramView& histogram, const CodeGrid& grid, double* moments);

}  // namespace halfbyte
