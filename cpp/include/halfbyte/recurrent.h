// One step of a recurrent cell, after both halves of its gates are there. PyTorch's equations and order of the gates:
//   LSTM  i, f, g, o:  c' = sigmoid(f) * c + sigmoid(i) * tanh(g),  h' = sigmoid(o) * tanh(c')
//   GRU   r, z, n:     n = tanh(xn + sigmoid(r) * hn),              h' = n + sigmoid(z) * (h - n)
//   RNN                h' = tanh(gate) or max(gate, 0)
// where a gate is x_gates + h_gates, but for a GRU's xn and hn, which stay apart. All in float32, in the order of the
// formulas and without fused operations, so the levels give equal bits. gates.inl.h says how far sigmoid and tanh are
// from the exact functions; NaN gives NaN.
#pragma once
#include "halfbyte/types.h"

namespace halfbyte {

enum class Cell : int { kLstm = 0, kGru = 1, kRnnTanh = 2, kRnnRelu = 3 };

constexpr int64_t gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }

struct CellStep {
  const float* x_gates;  // [rows, gates * hidden], row stride x_stride
  const float* h_gates;  // [rows, gates * hidden], row stride h_stride
  int64_t x_stride, h_stride;
  int64_t hidden;
  const float* h;  // [rows, hidden]: state before; only a GRU reads it
  float* c;        // [rows, hidden]: an LSTM's cell state before, overwritten by the one after; else null
  float* y;        // [rows, hidden]: gets h'
};

struct RecurrentKernels {
  // Rows [0, rows), hidden units [unit_begin, unit_end).
  void (*cell_step)(Cell cell, const CellStep& step, int64_t rows, int64_t unit_begin, int64_t unit_end);
  void (*sigmoid)(const float* x, float* y, int64_t count);
  void (*tanh)(const float* x, float* y, int64_t count);
};

}  // namespace halfbyte
