// Search for the scale (and zero point) of one group of weights that loses least: sum(importance * (x_hat - w)^2).
// Candidates shrink the min/max range step by step. The winner's codes then give a weighted least-squares scale, which
// is the best one for those codes; it is kept where quantizing anew with it loses less. Compute bound: 11 vector
// operations for 16 weights and a candidate, with a group's weights in the first-level cache.
#pragma once
#include <limits>

#include "codebook.inl.h"
#include "minmax.inl.h"

namespace halfbyte {
namespace {
namespace elementwise {

// One group: weights and their importance (null: all ones).
struct Group {
  const float* w;
  const float* importance;
  int64_t count;
};

// Calls f(weights, importance) for each sixteen of a group. Both are zero past its end, where the error is zero then:
// the ranges of codes all contain 0.
template <class F>
inline void for_each_lanes(const Group& group, F f) {
  const Lanes ones = broadcast(1.f);
  int64_t i = 0;
  for (; i + kLanes <= group.count; i += kLanes) {
    f(load(group.w + i), group.importance == nullptr ? ones : load(group.importance + i));
  }
  if (i == group.count) return;
  Partial<float> importance;
  for (int64_t lane = 0; lane < group.count - i; ++lane) {
    importance.values[lane] = group.importance == nullptr ? 1.f : group.importance[i + lane];
  }
  f(load(Partial<float>(group.w + i, group.count - i).values), load(importance.values));
}

// Inclusive ends of the codes, counted from the zero point.
struct CodeRange {
  float lowest, highest;
};

inline float squared_error(const Group& group, float scale, const CodeRange& range) {
  const Lanes step = broadcast(scale), inverse = broadcast(1.f / scale);
  const Lanes lowest = broadcast(range.lowest), highest = broadcast(range.highest);
  Lanes total = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    const Lanes error = round_small(clamp(w * inverse, lowest, highest)) * step - w;
    total = total + importance * (error * error);
  });
  return sum(total);
}

// The scale that loses least for the codes which `scale` gives: sum(importance * w * code) / sum(importance * code^2).
inline float refit_scale(const Group& group, float scale, const CodeRange& range) {
  const Lanes inverse = broadcast(1.f / scale);
  const Lanes lowest = broadcast(range.lowest), highest = broadcast(range.highest);
  Lanes numerator = broadcast(0.f), denominator = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    const Lanes code = round_small(clamp(w * inverse, lowest, highest));
    const Lanes weighted = importance * code;
    numerator = numerator + weighted * w;
    denominator = denominator + weighted * code;
  });
  const float fitted = sum(numerator) / sum(denominator);
  return fitted > 0.f ? fitted : scale;  // no code but 0, or no importance: 0 / 0
}

template <FloatType Type>
inline float representable_scale(float scale, float smallest, float largest) {
  const float rounded = widen<Type>(narrow<Type>(scale));
  return rounded < smallest ? smallest : rounded > largest ? largest : rounded;
}

// `scale` as its type stores it, neither infinite nor below the smallest normal number.
inline float representable_scale(float scale, FloatType type) {
  switch (type) {
    case FloatType::kBFloat16:
      return representable_scale<FloatType::kBFloat16>(scale, 0x1p-126f, 0x1.fep127f);
    case FloatType::kFloat16:
      return representable_scale<FloatType::kFloat16>(scale, 0x1p-14f, 65504.f);
    default:
      return representable_scale<FloatType::kFloat32>(scale, 0x1p-126f, std::numeric_limits<float>::max());
  }
}

// Binary weights are +-scale; the scale that loses least is the weighted mean of |w|.
inline void search_binary(const Group& group, FloatType scale_type, float* scale, float* loss) {
  Lanes weighted = broadcast(0.f), weights = broadcast(0.f), plain = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    weighted = weighted + importance * abs(w);
    weights = weights + importance;
    plain = plain + abs(w);
  });
  const float total = sum(weights);
  const float mean = total > 0.f ? sum(weighted) / total : sum(plain) / static_cast<float>(group.count);
  const float magnitude = mean > 0.f ? representable_scale(mean, scale_type) : 1.f;
  const Lanes step = broadcast(magnitude);
  Lanes error = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    const Lanes difference = abs(w) - step;
    error = error + importance * (difference * difference);
  });
  *scale = magnitude;
  *loss = sum(error);
}

inline float squared_error(const Group& group, float scale, const Codebook& codebook) {
  const Lanes step = broadcast(scale), inverse = broadcast(1.f / scale);
  Lanes total = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    const Lanes error = codebook.nearest(w * inverse).value * step - w;
    total = total + importance * (error * error);
  });
  return sum(total);
}

inline float refit_scale(const Group& group, float scale, const Codebook& codebook) {
  const Lanes inverse = broadcast(1.f / scale);
  Lanes numerator = broadcast(0.f), denominator = broadcast(0.f);
  for_each_lanes(group, [&](const Lanes& w, const Lanes& importance) {
    const Lanes value = codebook.nearest(w * inverse).value;
    const Lanes weighted = importance * value;
    numerator = numerator + weighted * w;
    denominator = denominator + weighted * value;
  });
  const float fitted = sum(numerator) / sum(denominator);
  return fitted > 0.f ? fitted : scale;
}

inline void search_codebook(const Group& group, const SearchOptions& options, float largest, float* scale,
                            float* loss) {
  const Codebook codebook(options);
  const auto consider = [&](float candidate, bool first) {
    const float error = squared_error(group, candidate, codebook);
    if (!first && !(error < *loss)) return;
    *scale = candidate;
    *loss = error;
  };
  if (largest == 0.f) {  // 1 where zero is an entry; else the scale whose smallest entry is nearest to zero
    consider(1.f, true);
    if (*loss > 0.f) consider(representable_scale(0.f, options.scale_type), false);
    return;
  }
  const float base = largest / codebook.reach();
  for (int step = 0; step < options.steps; ++step) {
    const float shrink = 1.f - static_cast<float>(step) * options.shrink_step;
    consider(representable_scale(base * shrink, options.scale_type), step == 0);
  }
  if (options.steps > 1) {
    consider(representable_scale(refit_scale(group, *scale, codebook), options.scale_type), false);
  }
}

inline void search_qparams(const float* w, const float* importance, int64_t count, const SearchOptions& options,
                           float* scale, int32_t* zero_point, float* loss) {
  const Group group = {w, importance, count};
  float low, high;
  minmax_run<FloatType::kFloat32>(w, count, &low, &high);
  *zero_point = 0;
  if (!(high - low < std::numeric_limits<float>::infinity())) {  // also NaN; a finite range past FLT_MAX counts as well
    *scale = *loss = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  if (options.codebook != nullptr) return search_codebook(group, options, std::max(-low, high), scale, loss);
  if (options.symmetric && options.bits == 1) return search_binary(group, options.scale_type, scale, loss);

  const float steps = static_cast<float>((1 << options.bits) - 1);
  const float half = static_cast<float>(1 << (options.bits - 1));
  const float qmax = options.symmetric ? half - 1.f : steps;
  const float qmin = !options.symmetric ? 0.f : options.narrow_range ? -qmax : -half;
  low = std::min(low, 0.f);
  high = std::max(high, 0.f);
  const float base = options.symmetric ? std::max(high / qmax, low / qmin) : (high - low) / steps;
  if (!(base > 0.f)) {
    *scale = 1.f;
    *loss = 0.f;
    return;
  }

  float best_scale = 0.f, best_zero_point = 0.f, best_loss = 0.f;
  const auto range_of = [&](float zero) { return CodeRange{qmin - zero, qmax - zero}; };
  for (int step = 0; step < options.steps; ++step) {
    const float shrink = 1.f - static_cast<float>(step) * options.shrink_step;
    const float candidate = representable_scale(base * shrink, options.scale_type);
    const float exact_zero = options.symmetric ? 0.f : std::clamp(-low * shrink / candidate, 0.f, steps);
    const float zero = (exact_zero + 12582912.f) - 12582912.f;  // half to even, as in round_small
    const float error = squared_error(group, candidate, range_of(zero));
    if (step > 0 && !(error < best_loss)) continue;
    best_scale = candidate;
    best_zero_point = zero;
    best_loss = error;
  }
  if (options.steps > 1) {
    const CodeRange range = range_of(best_zero_point);
    const float refitted = representable_scale(refit_scale(group, best_scale, range), options.scale_type);
    const float error = squared_error(group, refitted, range);
    if (error < best_loss) {
      best_scale = refitted;
      best_loss = error;
    }
  }
  *scale = best_scale;
  *zero_point = static_cast<int32_t>(best_zero_point);
  *loss = best_loss;
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
