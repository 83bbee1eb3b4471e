// Sums of the lanes of many vectors, in the order of `sum`. One after another each waits for four additions in a row;
// where a register holds all lanes, AVX-512, sixteen vectors are summed together: a quarter of the operations, and none
// waits.
#pragma once
#include "xsimd_arch.h"

namespace halfbyte {
namespace {
namespace elementwise {

class LaneSums {
 public:
  // sums[0], sums[1], ... are written as vectors come; finish() writes the last.
  explicit LaneSums(float* sums) : sums_(sums) {}
#if defined(__AVX512BW__)
  void put(const Lanes& lanes) {
    rows_[count_] = lanes.batch[0];
    if (++count_ < kLanes) return;
    // Quarter k of the result has the rows 4 * k .. 4 * k + 3, one from each of four registers that hold four rows.
    const __m512 first = added<0x44, 0xee>(four_rows(0), four_rows(1));
    const __m512 second = added<0x44, 0xee>(four_rows(2), four_rows(3));
    const __m512 all = added<0x88, 0xdd>(first, second);
    _mm512_storeu_ps(sums_, all);
    sums_ += kLanes;
    count_ = 0;
  }
  void finish() {
    for (int i = 0; i < count_; ++i) *sums_++ = sum(Lanes{{rows_[i]}});
    count_ = 0;
  }

 private:
  // In each quarter, the elements that Low picks from a and b, plus those that High picks.
  template <int Low, int High>
  [[gnu::always_inline]] static __m512 added(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, Low), _mm512_shuffle_ps(a, b, High));
  }
  // Rows i, i + 4, i + 8 and i + 12, a quarter each: lanes added until four are left.
  [[gnu::always_inline]] __m512 four_rows(int i) const {
    const __m512 ab = eight_lanes(rows_[i], rows_[i + 4]), cd = eight_lanes(rows_[i + 8], rows_[i + 12]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  }
  [[gnu::always_inline]] static __m512 eight_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  __m512 rows_[kLanes];
  int count_ = 0;
#else
  void put(const Lanes& lanes) { *sums_++ = sum(lanes); }
  void finish() {}

 private:
#endif
  float* sums_;
};

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
