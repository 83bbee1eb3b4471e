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

// lo and hi take in `rows` rows of kLanes columns, `stride` elements apart. They stay in registers meanwhile, and the
// rows are as many streams, each read from end to end as hardware prefetches best.
template <FloatType Type>
[[gnu::always_inline]] inline void merge_rows(const Element<Type>* values, int64_t stride, int64_t rows, float* lo,
                                              float* hi) {
  Lanes lowest = load(lo), highest = load(hi);
  uint32_t ordered = 0xffff;
  for (int64_t row = 0; row < rows; ++row) {
    const Lanes value = load_floats<Type>(values + row * stride);
    lowest = min(lowest, value);  // keeps a NaN that is there already
    highest = max(highest, value);
    ordered &= equal_bits(value, value);
  }
  store(lo, lowest + broadcast(0.f));
  store(hi, highest + broadcast(0.f));
  for (int64_t lane = 0; ordered != 0xffff && lane < kLanes; ++lane) {
    if ((ordered >> lane & 1u) == 0) lo[lane] = hi[lane] = std::numeric_limits<float>::quiet_NaN();
  }
}

template <FloatType Type>
void minmax_columns(const void* x, int64_t columns, int64_t row_begin, int64_t row_end, float* lo, float* hi) {
  // More would compete for one cache set where `columns` is a power of two.
  constexpr int64_t kRowsTogether = 4;
  const auto* in = static_cast<const Element<Type>*>(x);
  const int64_t whole = columns / kLanes * kLanes, rest = columns - whole;
  Partial<float> low(lo + whole, rest), high(hi + whole, rest);
  for (int64_t row = row_begin; row < row_end; row += kRowsTogether) {
    const int64_t rows = std::min(kRowsTogether, row_end - row);
    const Element<Type>* values = in + row * columns;
    if (rows == kRowsTogether) {
      for (int64_t i = 0; i < whole; i += kLanes) merge_rows<Type>(values + i, columns, kRowsTogether, lo + i, hi + i);
    } else {
      for (int64_t i = 0; i < whole; i += kLanes) merge_rows<Type>(values + i, columns, rows, lo + i, hi + i);
    }
    for (int64_t r = 0; rest > 0 && r < rows; ++r) {
      const Partial<Element<Type>> last(values + r * columns + whole, rest);
      merge_rows<Type>(last.values, 0, 1, low.values, high.values);
    }
  }
  low.copy_to(lo + whole, rest);
  high.copy_to(hi + whole, rest);
}

}  // namespace elementwise
}  // namespace
}  // namespace halfbyte
