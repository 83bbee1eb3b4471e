// Search for the range that loses least, over a histogram. Its running sums of 1, x and x^2 give the error of any run
// of values that share a code in constant time: sum (x - v)^2 = S2 - 2 v S1 + v^2 S0. So a candidate costs one step a
// code whatever the number of bins. A cheaper estimate (codes evenly filled: step^2 / 12 a value) finds the
// neighbourhood first.
#include "halfbyte/histogram_search.h"

#include <algorithm>
#include <cmath>

namespace halfbyte {
namespace {

struct Moments {
  double mass, sum, square;

  // Sum of (x - v)^2 over what the moments describe.
  double error_around(double v) const { return std::max(0.0, square - 2 * v * sum + v * v * mass); }
};

Moments operator-(const Moments& a, const Moments& b) { return {a.mass - b.mass, a.sum - b.sum, a.square - b.square}; }

struct Range {
  double low, high;
};

class Search {
 public:
  Search(const HistogramView& histogram, const CodeGrid& grid, double* moments)
      : histogram_(histogram),
        grid_(grid),
        bins_per_unit_(1 / histogram.width),
        moments_(reinterpret_cast<Moments*>(moments)) {
    Moments total = {0, 0, 0};
    for (int64_t i = 0; i < histogram.bins; ++i) {
      moments_[i] = total;
      const double count = histogram.counts[i], a = histogram.low + static_cast<double>(i) * histogram.width;
      total = add(total, count, a, histogram.width);
    }
    moments_[histogram.bins] = total;
  }

  SearchedRange run() const {
    const double total = moments_[histogram_.bins].mass;
    const Range full = occupied();
    if (!(total > 0) || full.high <= full.low) return {0, 0, 0};
    Range best = coarse(full);
    double best_error = exact_error(best);
    if (const double error = exact_error(full); error <= best_error) best = full, best_error = error;
    for (double step = 0.016; step > 0.0008; step /= 2) {
      descend(full, step, best, best_error, [this](const Range& r) { return exact_error(r); });
    }
    return {best.low, best.high, best_error / total};
  }

 private:
  static Moments add(const Moments& before, double count, double begin, double length) {
    const double center = begin + length / 2;
    return {before.mass + count, before.sum + count * center,
            before.square + count * (center * center + length * length / 12)};
  }

  // Moments of all values below t.
  Moments below(double t) const {
    const double position = (t - histogram_.low) * bins_per_unit_;
    if (!(position > 0)) return {0, 0, 0};
    if (position >= static_cast<double>(histogram_.bins)) return moments_[histogram_.bins];
    const auto bin = static_cast<int64_t>(position);
    const double part = position - static_cast<double>(bin);
    const double begin = histogram_.low + static_cast<double>(bin) * histogram_.width;
    return add(moments_[bin], histogram_.counts[bin] * part, begin, part * histogram_.width);
  }

  Range occupied() const {
    int64_t first = 0, last = histogram_.bins - 1;
    while (first < last && histogram_.counts[first] == 0) ++first;
    while (last > first && histogram_.counts[last] == 0) --last;
    const double low = std::min(0.0, histogram_.low + static_cast<double>(first) * histogram_.width);
    const double high = std::max(0.0, histogram_.low + static_cast<double>(last + 1) * histogram_.width);
    if (!grid_.symmetric) return {low, high};
    const double largest = std::max(-low, high);
    return {-largest, largest};
  }

  double step_of(const Range& range) const {
    return grid_.symmetric ? range.high / static_cast<double>(grid_.qmax)
                           : (range.high - range.low) / static_cast<double>(grid_.qmax - grid_.qmin);
  }

  // Values that zero stands for lose x^2, the others within the range step^2 / 12 on average.
  double estimated_error(const Range& range) const {
    const double step = step_of(range);
    const Moments low = below(range.low), high = below(range.high);
    const Moments around_zero = below(std::min(step / 2, range.high)) - below(std::max(-step / 2, range.low));
    const double inside = std::max(0.0, high.mass - low.mass - around_zero.mass);
    const Moments above = moments_[histogram_.bins] - high;
    return low.error_around(range.low) + above.error_around(range.high) + around_zero.error_around(0) +
           inside * step * step / 12;
  }

  double exact_error(const Range& range) const {
    const double step = step_of(range);
    const double zero = grid_.symmetric ? 0.0 : std::nearbyint(static_cast<double>(grid_.qmin) - range.low / step);
    Moments before = {0, 0, 0};
    double error = 0;
    for (int64_t code = grid_.qmin; code <= grid_.qmax; ++code) {
      const double value = (static_cast<double>(code) - zero) * step;
      const Moments up_to = code == grid_.qmax ? moments_[histogram_.bins] : below(value + step / 2);
      error += (up_to - before).error_around(value);
      before = up_to;
    }
    return error;
  }

  Range scaled(const Range& full, double low, double high) const {
    if (grid_.symmetric) return {-high * full.high, high * full.high};
    return {low * full.low, high * full.high};
  }

  Range coarse(const Range& full) const {
    constexpr int kSteps = 32;
    const bool both = !grid_.symmetric && full.low < 0 && full.high > 0;
    Range best = full;
    double best_error = estimated_error(full);
    for (int i = 1; i <= kSteps; ++i) {
      for (int j = both ? 1 : kSteps; j <= kSteps; ++j) {
        const double a = static_cast<double>(i) / kSteps, b = both ? static_cast<double>(j) / kSteps : a;
        const Range range = scaled(full, a, b);
        if (const double error = estimated_error(range); error < best_error) best = range, best_error = error;
      }
    }
    for (double step = 0.5 / kSteps; step > 0.0005; step /= 2) {
      descend(full, step, best, best_error, [this](const Range& r) { return estimated_error(r); });
    }
    return best;
  }

  // Moves each end by `step` parts of the full range, outwards or inwards, as long as that helps.
  template <class Error>
  void descend(const Range& full, double step, Range& best, double& best_error, Error error_of) const {
    for (int moves = 0; moves < 8; ++moves) {
      const Range from = best;
      for (int dl = -1; dl <= 1; ++dl) {
        for (int dh = -1; dh <= 1; ++dh) {
          if (grid_.symmetric ? dl != dh : dl != 0 && dh != 0) continue;
          const Range range = {std::clamp(from.low - dl * step * (full.high - full.low), full.low, 0.0),
                               std::clamp(from.high + dh * step * (full.high - full.low), 0.0, full.high)};
          if (!(range.high > range.low) || (range.low == from.low && range.high == from.high)) continue;
          if (const double error = error_of(range); error < best_error) best = range, best_error = error;
        }
      }
      if (best.low == from.low && best.high == from.high) return;
    }
  }

  HistogramView histogram_;
  CodeGrid grid_;
  double bins_per_unit_;
  Moments* moments_;  // [bins + 1]: of all values below each edge
};

}  // namespace

SearchedRange search_histogram_range(const HistogramView& histogram, const CodeGrid& grid, double* moments) {
  return Search(histogram, grid, moments).run();
}

}  // namespace halfbyte
