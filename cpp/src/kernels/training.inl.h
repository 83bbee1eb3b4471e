// The gradients of learned fake-quantize over sixteen lanes. Bound by memory: 14 vector operations for the 192 bytes of
// sixteen float32 elements that are read or written.
#pragma once
#include <limits>

#include "codebook.inl.h"
#include "elementwise.inl.h"
#include "halfbyte/training.h"
#include "lane_mask.inl.h"
#include "lane_sums.inl.h"

namespace halfbyte {
namespace {
namespace elementwise {

// What sixteen elements contribute to the three gradients.
struct LearnedGradient {
  Lanes x, scale, zero_point;
};

template <Estimator E>
inline LearnedGradient learned_gradient(const Lanes& x, const Lanes& grad, const Lanes& inverse_scale,
                                        const Lanes& lowest, const Lanes& highest) {
  const Lanes zero = broadcast(0.f), one = broadcast(1.f);
  const Lanes scaled = x * inverse_scale;
  // The two clamps of fake_quantize: rounding by addition needs the first, the second tells what lies outside.
  const Lanes rounded = round_small(clamp(scaled, lowest - one, highest + one));
  const Lanes code = clamp(rounded, lowest, highest);
  const LaneMask inside = E == Estimator::kRounded ? equal(code, rounded) : less(lowest, scaled, highest);
  const Lanes error = E == Estimator::kPact ? select(inside, zero, code) : code - select(inside, scaled, zero);
  return {.x = select(inside, grad, zero), .scale = grad * error, .zero_point = select(inside, zero, grad)};
}

// Calls step(load_x, load_grad, i) and stores what it returns as grad_x, for each sixteen of `count` elements. Past the
// end, x and grad are zero, so nothing is added to the sums there.
template <FloatType Type, class Step>
inline void for_each_gradient(const Element<Type>* x, const Element<Type>* grad, Element<Type>* grad_x, int64_t count,
                              Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_floats<Type>(grad_x + i, step(load_floats<Type>(x + i), load_floats<Type>(grad + i), i));
  }
  if (i == count) return;
  const Partial<Element<Type>> last_x(x + i, count - i), last_grad(grad + i, count - i);
  Partial<Element<Type>> out;
  store_floats<Type>(out.values, step(load_floats<Type>(last_x.values), load_floats<Type>(last_grad.values), i));
  out.copy_to(grad_x + i, count - i);
}

template <FloatType Type, Estimator E>
void learned_gradient_runs(const void* x, const void* grad, void* grad_x, const AffineGrid& grid, int64_t block_begin,
                           int64_t block_end, const GradientSums& sums) {
  const auto* in = static_cast<const Element<Type>*>(x);
  const auto* upstream = static_cast<const Element<Type>*>(grad);
  auto* out = static_cast<Element<Type>*>(grad_x);
  const int64_t blocks = ceil_div(grid.run_length, kGradientBlock);  // of one run
  int64_t run = block_begin / blocks, offset = block_begin % blocks * kGradientBlock, channel = run % grid.channels;
  LaneSums scale_sums(sums.scale + block_begin), zero_point_sums(sums.zero_point + block_begin);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = run * grid.run_length + offset;
    const auto zero_point = static_cast<float>(grid.zero_point[channel]);
    const Lanes inverse_scale = broadcast(1.f / grid.scale[channel]);
    const Lanes lowest = broadcast(static_cast<float>(grid.qmin) - zero_point);
    const Lanes highest = broadcast(static_cast<float>(grid.qmax) - zero_point);
    Lanes scale_sum = broadcast(0.f), zero_point_sum = broadcast(0.f);
    for_each_gradient<Type>(
        in + begin, upstream + begin, out + begin, std::min(kGradientBlock, grid.run_length - offset),
        [&](const Lanes& value, const Lanes& gradient, int64_t) {
          const LearnedGradient part = learned_gradient<E>(value, gradient, inverse_scale, lowest, highest);
          scale_sum = scale_sum + part.scale;
          zero_point_sum = zero_point_sum + part.zero_point;
          return part.x;
        });
    scale_sums.put(scale_sum);
    zero_point_sums.put(zero_point_sum);
    offset += kGradientBlock;
    if (offset < grid.run_length) continue;
    offset = 0;
    ++run;
    if (++channel == grid.channels) channel = 0;
  }
  scale_sums.finish();
  zero_point_sums.finish();
}

// `Rows` rows, one below the other and each `stride` elements long, at once: qparams and sums are read and written once
// for all of them. The pointers are those of the first row.
template <FloatType Type, Estimator E, int Rows>
inline void learned_gradient_rows(const Element<Type>* x, const Element<Type>* grad, Element<Type>* grad_x,
                                  int64_t stride, const ColumnGrid& grid, int64_t column_begin, int64_t column_end,
                                  const GradientSums& sums) {
  for (int64_t column = column_begin; column < column_end; column += kLanes) {
    const Lanes inverse_scale = load(grid.inverse_scale + column);
    const Lanes lowest = load(grid.lowest + column), highest = load(grid.highest + column);
    Lanes scale_sum = load(sums.scale + column), zero_point_sum = load(sums.zero_point + column);
    for (int row = 0; row < Rows; ++row) {
      const int64_t at = row * stride + column;
      for_each_gradient<Type>(x + at, grad + at, grad_x + at, std::min(kLanes, column_end - column),
                              [&](const Lanes& value, const Lanes& gradient, int64_t) {
                                const LearnedGradient part =
                                    learned_gradient<E>(value, gradient, inverse_scale, lowest, highest);
                                scale_sum = scale_sum + part.scale;
                                zero_point_sum = zero_point_sum + part.zero_point;
                                return part.x;
                              });
    }
    store(sums.scale + column, scale_sum);
    store(sums.zero_point + column, zero_point_sum);
  }
}

template <FloatType Type, Estimator E>
void learned_gradient_columns(const void* x, const void* grad, void* grad_x, const ColumnGrid& grid, int64_t count,
                              int64_t columns, int64_t row_begin, int64_t row_end, int64_t column_begin,
                              int64_t column_end, const GradientSums& sums) {
  constexpr int kRows = 4;
  for (int64_t column = column_begin; column < column_end; column += kLanes) {
    store(sums.scale + column, broadcast(0.f));
    store(sums.zero_point + column, broadcast(0.f));
  }
  for (int64_t row = row_begin; row < row_end;) {
    const int64_t begin = row * columns;
    const auto* in = static_cast<const Element<Type>*>(x) + begin;
    const auto* upstream = static_cast<const Element<Type>*>(grad) + begin;
    auto* out = static_cast<Element<Type>*>(grad_x) + begin;
    if (row + kRows <= row_end && begin + (kRows - 1) * columns + column_end <= count) {
      learned_gradient_rows<Type, E, kRows>(in, upstream, out, columns, grid, column_begin, column_end, sums);
      row += kRows;
      continue;
    }
    learned_gradient_rows<Type, E, 1>(in, upstream, out, columns, grid, column_begin,
                                      std::min(column_end, count - begin), sums);
    ++row;
  }
}

// The codebook's entries that x is rounded to, in units of the scale; NaN stays NaN.
class CodebookRounding {
 public:
  explicit CodebookRounding(const CodebookGrid& grid)
      : codebook_(grid.values, grid.entries),
        binary_(grid.binary),
        low_(broadcast(grid.clip_low)),
        high_(broadcast(grid.clip_high)) {}

  Lanes entry(const Lanes& x, const Lanes& scaled) const {
    return replace_nan(x, binary_ ? sign(x) : codebook_.nearest(scaled).value, x);
  }
  LearnedGradient gradient(const Lanes& x, const Lanes& grad, const Lanes& inverse_scale) const {
    const Lanes zero = broadcast(0.f), scaled = x * inverse_scale;
    const LaneMask inside = less_equal(low_, scaled, high_);
    const Lanes value = entry(x, scaled);
    const Lanes error = binary_ ? value : value - select(inside, scaled, zero);
    return {.x = select(inside, grad, zero), .scale = grad * error, .zero_point = zero};
  }

 private:
  // By x, not by x / scale, which could underflow.
  static Lanes sign(const Lanes& x) {
    const Lanes one = broadcast(1.f);
    return select(less_equal(broadcast(0.f), x, broadcast(std::numeric_limits<float>::infinity())), one,
                  broadcast(0.f) - one);
  }
  Codebook codebook_;
  bool binary_;
  Lanes low_, high_;
};

template <FloatType Type>
void codebook_fake_quantize(const void* x, void* y, const CodebookGrid& grid, int64_t run_begin, int64_t run_end) {
  const CodebookRounding rounding(grid);
  for (int64_t run = run_begin; run < run_end; ++run) {
    const Lanes scale = broadcast(grid.scale[run]), inverse_scale = broadcast(1.f / grid.scale[run]);
    transform(
        static_cast<const Element<Type>*>(x) + run * grid.run_length,
        static_cast<Element<Type>*>(y) + run * grid.run_length, grid.run_length, load_floats<Type>, store_floats<Type>,
        [&](const Lanes& value, int64_t, int64_t) { return rounding.entry(value, value * inverse_scale) * scale; });
  }
}

template <FloatType Type>
void codebook_gradient(const void* x, const void* grad, void* grad_x, const CodebookGrid& grid, int64_t block_begin,
                       int64_t block_end, float* sums) {
  const CodebookRounding rounding(grid);
  const int64_t blocks = ceil_div(grid.run_length, kGradientBlock);  // of one run
  LaneSums scale_sums(sums + block_begin);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t run = block / blocks, offset = block % blocks * kGradientBlock;
    const int64_t begin = run * grid.run_length + offset;
    const Lanes inverse_scale = broadcast(1.f / grid.scale[run]);
    Lanes total = broadcast(0.f);
    for_each_gradient<Type>(
        static_cast<const Element<Type>*>(x) + begin, static_cast<const Element<Type>*>(grad) + begin,
        static_cast<Element<Type>*>(grad_x) + begin, std::min(kGradientBlock, grid.run_length - offset),
        [&](const Lanes& value, const Lanes& gradient, int64_t) {
          const LearnedGradient part = rounding.gradient(value, gradient, inverse_scale);
          total = total + part.scale;
          return part.x;
        });
    scale_sums.put(total);
  }
  scale_sums.finish();
}

// Calls f with a FloatType and an Estimator as compile-time constants.
template <class F>
inline void with_estimator(FloatType type, Estimator estimator, F f) {
  with_type(type, [&]<FloatType Type>() {
    switch (estimator) {
      case Estimator::kRounded:
        return f.template operator()<Type, Estimator::kRounded>();
      case Estimator::kLsq:
        return f.template operator()<Type, Estimator::kLsq>();
      case Estimator::kPact:
        return f.template operator()<Type, Estimator::kPact>();
    }
  });
}

}  // namespace elementwise

constexpr TrainingKernels training_kernels() {
  namespace e = elementwise;
  return {
      .learned_gradient_runs =
          [](const void* x, const void* grad, void* grad_x, FloatType type, const AffineGrid& grid, Estimator estimator,
             int64_t block_begin, int64_t block_end, const GradientSums& sums) {
            e::with_estimator(type, estimator, [&]<FloatType T, Estimator E>() {
              e::learned_gradient_runs<T, E>(x, grad, grad_x, grid, block_begin, block_end, sums);
            });
          },
      .learned_gradient_columns =
          [](const void* x, const void* grad, void* grad_x, FloatType type, const ColumnGrid& grid, Estimator estimator,
             int64_t count, int64_t columns, int64_t row_begin, int64_t row_end, int64_t column_begin,
             int64_t column_end, const GradientSums& sums) {
            e::with_estimator(type, estimator, [&]<FloatType T, Estimator E>() {
              e::learned_gradient_columns<T, E>(x, grad, grad_x, grid, count, columns, row_begin, row_end, column_begin,
                                                column_end, sums);
            });
          },
      .codebook_fake_quantize =
          [](const void* x, void* y, FloatType type, const CodebookGrid& grid, int64_t run_begin, int64_t run_end) {
            e::with_type(type, [&]<FloatType T>() { e::codebook_fake_quantize<T>(x, y, grid, run_begin, run_end); });
          },
      .codebook_gradient =
          [](const void* x, const void* grad, void* grad_x, FloatType type, const CodebookGrid& grid,
             int64_t block_begin, int64_t block_end, float* sums) {
            e::with_type(type, [&]<FloatType T>() {
              e::codebook_gradient<T>(x, grad, grad_x, grid, block_begin, block_end, sums);
            });
          },
  };
}

}  // namespace
}  // namespace halfbyte
