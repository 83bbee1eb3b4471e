// The entry of a codebook that is nearest to each of sixteen values, and its code: as many codes as there are midpoints
// below the value, so a midpoint itself belongs to the lower entry and NaN to the first one. Two or three vector
// operations an entry; where a register holds all entries, AVX-512, a binary search of four steps.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

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
    std::fill(between_ + count_, between_ + kCodebookEntries, std::numeric_limits<float>::infinity());
    std::copy_n(values_, count_, table_);
  }

  Nearest nearest(const Lanes& x) const {
#if defined(__AVX512BW__)
    if (count_ > 4) return searched(x);
#endif
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
#if defined(__AVX512BW__)
  // between_ increases, so the midpoints below x are the first ones: `code` of them are known to be, and 8, 4, 2 and
  // then 1 more are where the last of these is.
  Nearest searched(const Lanes& x) const {
    const __m512 between = _mm512_load_ps(between_), value = x.batch[0];
    __m512i code = _mm512_setzero_si512();
    for (int more = kCodebookEntries / 2; more > 0; more /= 2) {
      const __m512i further = _mm512_add_epi32(code, _mm512_set1_epi32(more));
      const __mmask16 above = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(further, between), _CMP_GT_OQ);
      code = _mm512_mask_mov_epi32(code, above, further);
    }
    Nearest found;
    found.value.batch[0] = _mm512_permutexvar_ps(code, _mm512_load_ps(table_));
    found.code.batch[0] = _mm512_cvtepi32_ps(code);
    return found;
  }
#endif
  int count_;
  const float* values_;
  alignas(64) float between_[kCodebookEntries] = {};  // [i]: between entries i - 1 and i
  alignas(64) float table_[kCodebookEntries] = {};
};

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
