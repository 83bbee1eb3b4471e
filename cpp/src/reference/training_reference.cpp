#include "training_reference.h"

#include <algorithm>
#include <cmath>

#include "elementwise_reference.h"

namespace halfbyte::reference {
namespace {

BlockSums folded(BlockSums (&lanes)[kElementLanes]) {
  for (int64_t half = kElementLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i].scale += lanes[i + half].scale;
      lanes[i].zero_point += lanes[i + half].zero_point;
    }
  }
  return lanes[0];
}

}  // namespace

void add_learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t i, float scale,
                          int32_t zero_point, int32_t qmin, int32_t qmax, Estimator estimator, BlockSums& sums) {
  const float inverse = 1.f / scale, upstream = to_float(grad, type, i), scaled = to_float(x, type, i) * inverse;
  const float code = std::nearbyint(scaled);
  const auto lowest = static_cast<float>(qmin - zero_point), highest = static_cast<float>(qmax - zero_point);
  const bool inside =
      estimator == Estimator::kRounded ? code >= lowest && code <= highest : scaled > lowest && scaled < highest;
  if (inside) {
    from_float(upstream, grad_x, type, i);
    sums.scale += upstream * (estimator == Estimator::kPact ? 0.f : code - scaled);
  } else {
    from_float(0.f, grad_x, type, i);
    sums.scale += upstream * (std::isnan(code) ? code : std::clamp(code, lowest, highest));
    sums.zero_point += upstream;
  }
}

BlockSums learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t count,
                           float scale, int32_t zero_point, int32_t qmin, int32_t qmax, Estimator estimator) {
  BlockSums lanes[kElementLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    add_learned_gradient(x, grad, grad_x, type, begin + i, scale, zero_point, qmin, qmax, estimator,
                         lanes[i % kElementLanes]);
  }
  return folded(lanes);
}

float codebook_entry(float x, float scale, const CodebookGrid& grid) {
  if (std::isnan(x)) return x;
  if (grid.binary) return x >= 0.f ? 1.f : -1.f;
  int code = 0;
  while (code + 1 < grid.entries && x * (1.f / scale) > 0.5f * (grid.values[code] + grid.values[code + 1])) {
    ++code;
  }
  return grid.values[code];
}

float codebook_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t count,
                        float scale, const CodebookGrid& grid) {
  BlockSums lanes[kElementLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float value = to_float(x, type, begin + i), upstream = to_float(grad, type, begin + i);
    const float scaled = value * (1.f / scale), entry = codebook_entry(value, scale, grid);
    const bool inside = scaled >= grid.clip_low && scaled <= grid.clip_high;
    from_float(inside ? upstream : 0.f, grad_x, type, begin + i);
    lanes[i % kElementLanes].scale += upstream * (inside && !grid.binary ? entry - scaled : entry);
  }
  return folded(lanes).scale;
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
