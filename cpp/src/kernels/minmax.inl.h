// Minimum and maximum of runs and of columns, in one pass over memory.
#pragma once
#include <limits>

#include "load_store.inl.h"

namespace halfbyte {
namespace {
namespace elementwise {

// min(lo, x) keeps lo where x is NaN, so NaN is looked for on its own: a lane that compares unequal to itself.
template <FloatType Type>
void minmax_run(const Element<Type>* x, int64_t count, float* lo, float* hi) {
  Lanes lowest = broadcast(std::numeric_limits<float>::infinity());
  Lanes highest = broadcast(-std::numeric_limits<float>::infinity());
  uint32_t ordered = 0xffff;
  const auto merge = [&](const Lanes& value) {
    lowest = min(lowest, value);
    highest = max(highest, value);
    ordered &= equal_bits(value, value);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) merge(load_floats<Type>(x + i));
  if (i < count) {
    Partial<Element<Type>> rest;
    for (int64_t lane = 0; lane < kLanes; ++lane) rest.values[lane] = x[i + (lane < count - i ? lane : 0)];
    merge(load_floats<Type>(rest.values));
  }
  float low[kLanes], high[kLanes];
  store(low, lowest);
  store(high, highest);
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    low[0] = low[lane] < low[0] ? low[lane] : low[0];
    high[0] = high[lane] > high[0] ? high[lane] : high[0];
  }
  const bool nan = ordered != 0xffff;
  // Adding +0 turns -0 into +0: which of the two zeros a minimum returns depends on the order of the elements.
  *lo = nan ? std::numeric_limits<float>::quiet_NaN() : low[0] + 0.f;
  *hi = nan ? std::numeric_limits<float>::quiet_NaN() : high[0] + 0.f;
}

template <FloatType Type>
void minmax_runs(const void* x, int64_t run_length, int64_t run_begin, int64_t run_end, float* lo, float* hi) {
  const auto* in = static_cast<const Element<Type>*>(x);
  for (int64_t run = run_begin; run < run_end; ++run) {
    minmax_run<Type>(in + run * run_length, run_length, lo + run, hi + run);
  }
}

// lo and hi take in one row of at most kLanes columns.
template <FloatType Type>
[[gnu::always_inline]] inline void merge_row(const Element<Type>* values, float* lo, float* hi) {
  const Lanes nan = broadcast(std::numeric_limits<float>::quiet_NaN());
  const Lanes value = load_floats<Type>(values) + broadcast(0.f);
  store(lo, replace_nan(value, min(load(lo), value), nan));
  store(hi, replace_nan(value, max(load(hi), value), nan));
}

template <FloatType Type>
void minmax_columns(const void* x, int64_t columns, int64_t row_begin, int64_t row_end, float* lo, float* hi) {
  const auto* in = static_cast<const Element<Type>*>(x);
  // lo and hi of a strip stay in the first-level cache while its rows pass by.
  constexpr int64_t kStrip = 512;
  for (int64_t strip = 0; strip < columns; strip += kStrip) {
    const int64_t end = std::min(strip + kStrip, columns);
    for (int64_t row = row_begin; row < row_end; ++row) {
      const Element<Type>* values = in + row * columns;
      int64_t i = strip;
      for (; i + kLanes <= end; i += kLanes) merge_row<Type>(values + i, lo + i, hi + i);
      if (i == end) continue;
      const Partial<Element<Type>> rest(values + i, end - i);
      Partial<float> low(lo + i, end - i), high(hi + i, end - i);
      merge_row<Type>(rest.values, low.values, high.values);
      low.copy_to(lo + i, end - i);
      high.copy_to(hi + i, end - i);
    }
  }
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
