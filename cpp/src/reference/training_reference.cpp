#include "training_reference.h"

#include <algorithm>
#include <cmath>

#include "elementwise_reference.h"

namespace halfbyte::reference {

void add_learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t i, float scale,
                          int32_t zero_point, int32_t qmin, int32_t qmax, BlockSums& sums) {
  const float inverse = 1.f / scale, upstream = to_float(grad, type, i), scaled = to_float(x, type, i) * inverse;
  const float code = std::nearbyint(scaled);
  const auto lowest = static_cast<float>(qmin - zero_point), highest = static_cast<float>(qmax - zero_point);
  if (code >= lowest && code <= highest) {
    from_float(upstream, grad_x, type, i);
    sums.scale += upstream * (code - scaled);
  } else {
    from_float(0.f, grad_x, type, i);
    sums.scale += upstream * (std::isnan(code) ? code : std::clamp(code, lowest, highest));
    sums.zero_point += upstream;
  }
}

BlockSums learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t count,
                           float scale, int32_t zero_point, int32_t qmin, int32_t qmax) {
  BlockSums lanes[kElementLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    add_learned_gradient(x, grad, grad_x, type, begin + i, scale, zero_point, qmin, qmax, lanes[i % kElementLanes]);
  }
  for (int64_t half = kElementLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i].scale += lanes[i + half].scale;
      lanes[i].zero_point += lanes[i + half].zero_point;
    }
  }
  return lanes[0];
}

int64_t count_histogram(const void* x, FloatType type, int64_t count, const HistogramRange& range, uint64_t* bins) {
  int64_t nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float position = (to_float(x, type, i) - range.low) * range.bins_per_unit;
    if (std::isnan(position)) {
      ++nans;
      ++bins[0];
    } else {
      ++bins[static_cast<int64_t>(std::clamp(std::floor(position), 0.f, static_cast<float>(range.bins - 1)))];
    }
  }
  return nans;
}

}  // namespace halfbyte::reference
