// A truth value for each of sixteen lanes; comparisons with NaN are false.
#pragma once
#include "xsimd_arch.h"

namespace halfbyte {
namespace {
namespace elementwise {

struct LaneMask {
  xsimd::batch_bool<float, Arch> batch[kBatches];
};

inline LaneMask equal(const Lanes& a, const Lanes& b) {
  LaneMask mask;
  for (int i = 0; i < kBatches; ++i) mask.batch[i] = a.batch[i] == b.batch[i];
  return mask;
}

// low < v < high
inline LaneMask less(const Lanes& low, const Lanes& v, const Lanes& high) {
  LaneMask mask;
  for (int i = 0; i < kBatches; ++i) mask.batch[i] = (low.batch[i] < v.batch[i]) & (v.batch[i] < high.batch[i]);
  return mask;
}

// low <= v <= high
inline LaneMask less_equal(const Lanes& low, const Lanes& v, const Lanes& high) {
  LaneMask mask;
  for (int i = 0; i < kBatches; ++i) mask.batch[i] = (low.batch[i] <= v.batch[i]) & (v.batch[i] <= high.batch[i]);
  return mask;
}

inline Lanes select(const LaneMask& mask, const Lanes& yes, const Lanes& no) {
  Lanes lanes;
  for (int i = 0; i < kBatches; ++i) lanes.batch[i] = xsimd::select(mask.batch[i], yes.batch[i], no.batch[i]);
  return lanes;
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
