// The entry of a codebook that is nearest to each of sixteen values, and its code: as many codes as there are midpoints
// below the value, so a midpoint itself belongs to the lower entry and NaN to the first one. Two or three vector
// operations an entry, the same on every level.
#pragma once
#include "xsimd_arch.h"

namespace halfbyte {
namespace {
namespace elementwise {

struct Nearest {
  Lanes value, code;
};

class Codebook {
 public:
  explicit Codebook(const SearchOptions& options) : Codebook(options.codebook, options.codebook_entries) {}
  Codebook(const float* values, int count) : count_(count), values_(values) {
    for (int i = 1; i < count_; ++i) between_[i] = 0.5f * (values_[i - 1] + values_[i]);
  }

  Nearest nearest(const Lanes& x) const {
    Nearest found = {broadcast(values_[0]), broadcast(0.f)};
    for (int i = 1; i < count_; ++i) {
      const FloatBatch middle(between_[i]), value(values_[i]), code(static_cast<float>(i));
      for (int b = 0; b < kBatches; ++b) {
        const auto above = x.batch[b] > middle;
        found.value.batch[b] = xsimd::select(above, value, found.value.batch[b]);
        found.code.batch[b] = xsimd::select(above, code, found.code.batch[b]);
      }
    }
    return found;
  }
  // The largest magnitude: what the largest weight of a group is scaled to.
  float reach() const { return std::max(std::fabs(values_[0]), std::fabs(values_[count_ - 1])); }

 private:
  int count_;
  const float* values_;
  float between_[kCodebookEntries] = {};
};

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
