// The gates of recurrent cells. Bound by arithmetic: an LSTM takes about 150 vector operations and 5 divisions for 16
// units, against 16 * 4 * hidden multiply-adds of the product before it.
#pragma once
#include <algorithm>
#include <cstring>

#include "gates.inl.h"
#include "halfbyte/recurrent.h"

namespace halfbyte {
namespace {
namespace elementwise {

// The first `count` of sixteen floats; the others are 0.
inline Lanes load_first(const float* values, int64_t count) {
  if (count >= kLanes) return load(values);
  float whole[kLanes] = {};
  std::memcpy(whole, values, static_cast<size_t>(count) * sizeof(float));
  return load(whole);
}

inline void store_first(float* values, const Lanes& lanes, int64_t count) {
  if (count >= kLanes) return store(values, lanes);
  float whole[kLanes];
  store(whole, lanes);
  std::memcpy(values, whole, static_cast<size_t>(count) * sizeof(float));
}

template <Cell kCell>
inline void step_units(const CellStep& s, int64_t row, int64_t unit, int64_t count) {
  const float* x = s.x_gates + row * s.x_stride + unit;
  const float* h = s.h_gates + row * s.h_stride + unit;
  const int64_t at = row * s.hidden + unit;
  const auto x_gate = [&](int64_t gate) { return load_first(x + gate * s.hidden, count); };
  const auto h_gate = [&](int64_t gate) { return load_first(h + gate * s.hidden, count); };
  const auto gate = [&](int64_t g) { return x_gate(g) + h_gate(g); };
  Lanes state;
  if constexpr (kCell == Cell::kLstm) {
    const Lanes c = sigmoid(gate(1)) * load_first(s.c + at, count) + sigmoid(gate(0)) * tanh(gate(2));
    store_first(s.c + at, c, count);
    state = sigmoid(gate(3));  // times tanh(c), by finish_units
  } else if constexpr (kCell == Cell::kGru) {
    const Lanes n = tanh(x_gate(2) + sigmoid(gate(0)) * h_gate(2));
    state = n + sigmoid(gate(1)) * (load_first(s.h + at, count) - n);
  } else if constexpr (kCell == Cell::kRnnTanh) {
    state = tanh(gate(0));
  } else {
    state = max(gate(0), broadcast(0.f));
  }
  store_first(s.y + at, state, count);
}

// An LSTM's h' = o * tanh(c'), where y holds o. Apart from the rest, because tanh has to wait for c': with both in one
// loop, the latency of one unit after another is what a step takes.
inline void finish_units(const CellStep& s, int64_t row, int64_t unit, int64_t count) {
  const int64_t at = row * s.hidden + unit;
  store_first(s.y + at, load_first(s.y + at, count) * tanh(load_first(s.c + at, count)), count);
}

template <Cell kCell>
void step_rows(const CellStep& step, int64_t rows, int64_t unit_begin, int64_t unit_end) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t unit = unit_begin; unit < unit_end; unit += kLanes) {
      step_units<kCell>(step, row, unit, std::min(kLanes, unit_end - unit));
    }
    if constexpr (kCell == Cell::kLstm) {
      for (int64_t unit = unit_begin; unit < unit_end; unit += kLanes) {
        finish_units(step, row, unit, std::min(kLanes, unit_end - unit));
      }
    }
  }
}

inline void cell_step(Cell cell, const CellStep& step, int64_t rows, int64_t unit_begin, int64_t unit_end) {
  switch (cell) {
    case Cell::kLstm:
      return step_rows<Cell::kLstm>(step, rows, unit_begin, unit_end);
    case Cell::kGru:
      return step_rows<Cell::kGru>(step, rows, unit_begin, unit_end);
    case Cell::kRnnTanh:
      return step_rows<Cell::kRnnTanh>(step, rows, unit_begin, unit_end);
    case Cell::kRnnRelu:
      return step_rows<Cell::kRnnRelu>(step, rows, unit_begin, unit_end);
  }
}

template <class F>
inline void map_floats(const float* x, float* y, int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += kLanes) store_first(y + i, f(load_first(x + i, count - i)), count - i);
}

}  // namespace elementwise

constexpr RecurrentKernels recurrent_kernels() {
  namespace e = elementwise;
  return {
      .cell_step = e::cell_step,
      .sigmoid = [](const float* x, float* y,
                    int64_t count) { e::map_floats(x, y, count, [](const e::Lanes& v) { return e::sigmoid(v); }); },
      .tanh = [](const float* x, float* y,
                 int64_t count) { e::map_floats(x, y, count, [](const e::Lanes& v) { return e::tanh(v); }); },
  };
}

}  // namespace
}  // namespace halfbyte
