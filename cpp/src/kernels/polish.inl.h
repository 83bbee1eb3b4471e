// Lowers the error of rounded rows: sweeps of coordinate descent over codes, scales and zero points (gptq.h).
//
// 48 rows make a panel, as in gptq.inl.h. A range of columns (up to 128, or one wider group) gets its gradient e H from
// register-blocked products over all columns, nearly all of the work; what changes inside the range is then applied to
// the range's gradient at once. Each row only sees its own lane, so results do not depend on which rows go together.
#pragma once
#include "elementwise.inl.h"
#include "syrk.inl.h"

namespace halfbyte {
namespace {
namespace gptq {

namespace e = elementwise;
constexpr int64_t kPanelLanes = kPanelWidth / e::kLanes;
static_assert(kPanelWidth % e::kLanes == 0);

// The codes of the format, as floats.
struct CodeLimits {
  float lowest, highest;
  bool binary;
};

inline CodeLimits code_limits(const SearchOptions& options) {
  const float half = static_cast<float>(1 << (options.bits - 1));
  if (!options.symmetric) return {0.f, 2.f * half - 1.f, false};
  return {options.narrow_range ? 1.f - half : -half, half - 1.f, options.bits == 1 && options.codebook == nullptr};
}

// values[48] += factor * errors[48]
inline void add_scaled(float factor, const float* errors, float* values) {
  for (int64_t i = 0; i < kPanelWidth; i += kWidth) {
    store_vector(values + i, multiply_add(repeat(factor), load_vector(errors + i), load_vector(values + i)));
  }
}

// Floats of 64-byte aligned scratch, handed out one after another; with null memory only counted.
struct PolishScratch {
  float* errors;    // [panels][columns][48]: w - w_hat
  float* gradient;  // [panels][range][48]: errors times H
  float* steps;     // [range][48]: codes less zero points; binary: +-1
  float* product;   // [range][48]: steps of a group times H
  float* row;       // [columns]: one row as float32
  float* sums;      // [range]: columns of H summed over a group
  int64_t bytes = 0;

  PolishScratch(const PolishProblem& p, int64_t rows, void* memory) {
    const int64_t panels = ceil_div(rows, kPanelWidth);
    const int64_t range = round_up(polish_range(p.group_size), kFeedbackColumns);
    const auto take = [&](int64_t count) {
      auto* at = memory == nullptr ? nullptr : reinterpret_cast<float*>(static_cast<char*>(memory) + bytes);
      bytes += round_up(count * static_cast<int64_t>(sizeof(float)), 64);
      return at;
    };
    errors = take(panels * p.columns * kPanelWidth);
    gradient = take(panels * range * kPanelWidth);
    steps = take(range * kPanelWidth);
    product = take(range * kPanelWidth);
    row = take(p.columns);
    sums = take(range);
  }
};

// Columns [begin, begin + count), whose first slot is `slot`.
struct PolishRange {
  int64_t begin, count, slot;
};

// One panel of a task: rows [row, row + rows), rows <= 48.
struct PolishPanel {
  int64_t row, rows;
  float *errors, *gradient;
  bool changed;
};

// Row `row` of H at columns [i, i + 8) of the range, i a multiple of kFeedbackColumns.
inline const float* hessian_entries(const PolishProblem& p, const PolishRange& range, int64_t row, int64_t i) {
  return p.hessian + ((range.slot + i) / kFeedbackColumns * p.columns + row) * kFeedbackColumns;
}

inline float hessian_entry(const PolishProblem& p, const PolishRange& range, int64_t row, int64_t i) {
  return hessian_entries(p, range, row, i / kFeedbackColumns * kFeedbackColumns)[i % kFeedbackColumns];
}

inline float step_of(const PolishProblem& p, const CodeLimits& limits, int64_t row, int64_t column) {
  const uint8_t code = p.codes[row * p.columns + column];
  if (limits.binary) return code != 0 ? 1.f : -1.f;
  if (p.options.symmetric) return static_cast<float>(static_cast<int8_t>(code));
  return static_cast<float>(code) -
         static_cast<float>(p.zero_point[row * (p.columns / p.group_size) + column / p.group_size]);
}

inline void load_errors(const PolishProblem& p, const PolishScratch& scratch, const PolishPanel& panel) {
  const CodeLimits limits = code_limits(p.options);
  const int64_t element = p.weight_type == FloatType::kFloat32 ? 4 : 2, groups = p.columns / p.group_size;
  std::memset(panel.errors, 0, sizeof(float) * static_cast<size_t>(p.columns * kPanelWidth));
  for (int64_t r = 0; r < panel.rows; ++r) {
    const int64_t row = panel.row + r;
    const char* in = static_cast<const char*>(p.weight) + row * p.columns * element;
    e::with_type(p.weight_type, [&]<FloatType Type>() { e::to_float<Type>(in, scratch.row, p.columns); });
    for (int64_t k = 0; k < p.columns; ++k) {
      const float rounded = step_of(p, limits, row, k) * p.scale[row * groups + k / p.group_size];
      panel.errors[k * kPanelWidth + r] = scratch.row[k] - rounded;
    }
  }
}

// One group of a panel: its scales and zero points, and where its columns are in the range.
struct PolishGroup {
  alignas(64) float scale[kPanelWidth];
  alignas(64) float zero[kPanelWidth];
  int64_t first, count;  // within the range
};

// The best code of each column given all others.
inline void polish_codes(const PolishProblem& p, const PolishScratch& scratch, PolishPanel& panel,
                         const PolishRange& range, const PolishGroup& group) {
  const CodeLimits limits = code_limits(p.options);
  const e::Lanes lowest = e::broadcast(limits.lowest), highest = e::broadcast(limits.highest);
  const e::Lanes nothing = e::broadcast(0.f);
  for (int64_t i = group.first; i < group.first + group.count; ++i) {
    const float curvature = hessian_entry(p, range, range.begin + i, i);
    if (!(curvature > 0.f)) continue;
    const e::Lanes inverse = e::broadcast(1.f / curvature);
    float* errors = panel.errors + (range.begin + i) * kPanelWidth;
    alignas(64) float moved[kPanelWidth];
    bool any = false;
    for (int64_t at = 0; at < kPanelWidth; at += e::kLanes) {
      const e::Lanes scale = e::load(group.scale + at), zero = e::load(group.zero + at);
      const e::Lanes step = e::load(scratch.steps + i * kPanelWidth + at);
      const e::Lanes wanted = e::load(panel.gradient + i * kPanelWidth + at) * inverse;
      e::Lanes best;
      if (limits.binary) {
        float signs[e::kLanes];
        e::store(signs, step * scale + wanted);
        for (float& sign : signs) sign = sign >= 0.f ? 1.f : -1.f;
        best = e::load(signs);
      } else {
        e::Lanes steps_moved;
        for (int b = 0; b < e::kBatches; ++b) steps_moved.batch[b] = wanted.batch[b] / scale.batch[b];
        best = e::round_small(e::clamp(step + steps_moved, lowest - zero, highest - zero));
      }
      const e::Lanes change = (best - step) * scale;
      any |= e::equal_bits(change, nothing) != (1u << e::kLanes) - 1;
      e::store(scratch.steps + i * kPanelWidth + at, best);
      e::store(errors + at, e::load(errors + at) - change);
      e::store(moved + at, change);
    }
    if (!any) continue;
    panel.changed = true;
    for (int64_t j = 0; j < range.count; j += kFeedbackColumns) {
      const float* entries = hessian_entries(p, range, range.begin + i, j);
      for (int64_t c = 0; c < kFeedbackColumns; ++c) {  // past the last column: zeros
        add_scaled(-entries[c], moved, panel.gradient + (j + c) * kPanelWidth);
      }
    }
  }
}

// Lane by lane: sum over the group's columns of a * b.
inline void dot_columns(const PolishGroup& group, const float* a, const float* b, float* out) {
  for (int64_t at = 0; at < kPanelWidth; at += e::kLanes) {
    e::Lanes sum = e::broadcast(0.f);
    for (int64_t i = group.first; i < group.first + group.count; ++i) {
      sum = sum + e::load(a + i * kPanelWidth + at) * e::load(b + i * kPanelWidth + at);
    }
    e::store(out + at, sum);
  }
}

// values[range][48] -= change[48] * columns[range][48], for `count` columns.
inline void subtract_scaled(const float* change, const float* columns, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < kPanelWidth; at += e::kLanes) {
      float* value = values + i * kPanelWidth + at;
      e::store(value, e::load(value) - e::load(change + at) * e::load(columns + i * kPanelWidth + at));
    }
  }
}

// The scale that is best for the codes, where the one that can be stored is better than the present one.
inline void polish_scale(const PolishProblem& p, const PolishScratch& scratch, PolishPanel& panel,
                         const PolishRange& range, PolishGroup& group) {
  std::memset(scratch.product, 0,
              sizeof(float) * static_cast<size_t>(round_up(range.count, kFeedbackColumns) * kPanelWidth));
  for (int64_t i = 0; i < range.count; i += kFeedbackColumns) {
    const float* hessian = hessian_entries(p, range, range.begin + group.first, i);
    multiply_add(hessian, kFeedbackColumns, scratch.steps + group.first * kPanelWidth, group.count,
                 scratch.product + i * kPanelWidth);
  }
  alignas(64) float slope[kPanelWidth], curvature[kPanelWidth], change[kPanelWidth];
  dot_columns(group, scratch.steps, panel.gradient, slope);
  dot_columns(group, scratch.steps, scratch.product, curvature);
  bool any = false;
  for (int64_t r = 0; r < kPanelWidth; ++r) {
    change[r] = 0.f;
    const float wanted = group.scale[r] + slope[r] / curvature[r];
    if (!(curvature[r] > 0.f && wanted > 0.f && wanted < std::numeric_limits<float>::infinity())) continue;
    const float stored = e::representable_scale(wanted, p.options.scale_type), by = stored - group.scale[r];
    if (!(by * (2.f * slope[r] - by * curvature[r]) > 0.f)) continue;
    group.scale[r] = stored;
    change[r] = by;
    any = true;
  }
  if (!any) return;
  panel.changed = true;
  subtract_scaled(change, scratch.steps + group.first * kPanelWidth, group.count,
                  panel.errors + (range.begin + group.first) * kPanelWidth);
  subtract_scaled(change, scratch.product, range.count, panel.gradient);
}

// The zero point one higher or lower under the same codes, where that is better.
inline void polish_zero_point(const PolishProblem& p, const PolishScratch& scratch, PolishPanel& panel,
                              const PolishRange& range, PolishGroup& group) {
  float curvature = 0.f;
  for (int64_t j = 0; j < range.count; ++j) {
    float sum = 0.f;
    for (int64_t i = group.first; i < group.first + group.count; ++i)
      sum += hessian_entry(p, range, range.begin + i, j);
    scratch.sums[j] = sum;
    if (j >= group.first && j < group.first + group.count) curvature += sum;
  }
  alignas(64) float direction[kPanelWidth] = {}, change[kPanelWidth];
  bool any = false;
  for (int64_t r = 0; r < kPanelWidth; ++r) {
    float slope = 0.f;
    for (int64_t i = group.first; i < group.first + group.count; ++i) slope += panel.gradient[i * kPanelWidth + r];
    const float sign = slope > 0.f ? 1.f : -1.f, zero = group.zero[r] - sign, by = sign * group.scale[r];
    change[r] = 0.f;
    if (!(by * (2.f * slope - by * curvature) > 0.f) || zero < 0.f || zero > code_limits(p.options).highest) continue;
    group.zero[r] = zero;
    direction[r] = sign;
    change[r] = by;
    any = true;
  }
  if (!any) return;
  panel.changed = true;
  for (int64_t i = group.first; i < group.first + group.count; ++i) {
    add_scaled(1.f, direction, scratch.steps + i * kPanelWidth);
    add_scaled(-1.f, change, panel.errors + (range.begin + i) * kPanelWidth);
  }
  for (int64_t j = 0; j < range.count; ++j) add_scaled(-scratch.sums[j], change, panel.gradient + j * kPanelWidth);
}

inline void polish_panel(const PolishProblem& p, const PolishScratch& scratch, PolishPanel& panel,
                         const PolishRange& range) {
  const CodeLimits limits = code_limits(p.options);
  const int64_t groups = p.columns / p.group_size;
  std::memset(scratch.steps, 0, sizeof(float) * static_cast<size_t>(range.count * kPanelWidth));
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t i = 0; i < range.count; ++i) {
      scratch.steps[i * kPanelWidth + r] = step_of(p, limits, panel.row + r, range.begin + i);
    }
  }
  PolishGroup group;
  for (group.first = 0, group.count = p.group_size; group.first < range.count; group.first += p.group_size) {
    const int64_t index = (range.begin + group.first) / p.group_size;
    for (int64_t r = 0; r < kPanelWidth; ++r) {
      const int64_t at = (panel.row + r) * groups + index;
      group.scale[r] = r < panel.rows ? p.scale[at] : 1.f;
      group.zero[r] = r < panel.rows ? static_cast<float>(p.zero_point[at]) : 0.f;
    }
    polish_codes(p, scratch, panel, range, group);
    if (p.refit) polish_scale(p, scratch, panel, range, group);
    if (p.refit && !p.options.symmetric) polish_zero_point(p, scratch, panel, range, group);
    for (int64_t r = 0; r < panel.rows; ++r) {
      const int64_t row = panel.row + r;
      p.scale[row * groups + index] = group.scale[r];
      p.zero_point[row * groups + index] = static_cast<int32_t>(group.zero[r]);
      for (int64_t i = group.first; i < group.first + group.count; ++i) {
        const float step = scratch.steps[i * kPanelWidth + r];
        const float code = limits.binary ? std::max(step, 0.f) : step + group.zero[r];
        p.codes[row * p.columns + range.begin + i] = static_cast<uint8_t>(static_cast<int32_t>(code));
      }
    }
  }
}

inline void polish_rows(const PolishProblem& p, int64_t row_begin, int64_t row_end, void* memory) {
  const PolishScratch scratch(p, row_end - row_begin, memory);
  const int64_t width = polish_range(p.group_size), slots = round_up(width, kFeedbackColumns);
  PolishPanel panels[kRoundPanels];
  int64_t panel_count = 0;
  for (int64_t row = row_begin; row < row_end; row += kPanelWidth, ++panel_count) {
    panels[panel_count] = {.row = row,
                           .rows = std::min(kPanelWidth, row_end - row),
                           .errors = scratch.errors + panel_count * p.columns * kPanelWidth,
                           .gradient = scratch.gradient + panel_count * slots * kPanelWidth,
                           .changed = true};
    load_errors(p, scratch, panels[panel_count]);
  }
  bool changed = true;
  for (int sweep = 0; sweep < p.sweeps && changed; ++sweep) {
    for (int64_t n = 0; n < panel_count; ++n) panels[n].changed = false;
    for (int64_t begin = 0; begin < p.columns; begin += width) {
      const PolishRange range = {begin, std::min(width, p.columns - begin), begin / width * slots};
      const int64_t used = round_up(range.count, kFeedbackColumns);
      for (int64_t n = 0; n < panel_count; ++n) {
        std::memset(panels[n].gradient, 0, sizeof(float) * static_cast<size_t>(used * kPanelWidth));
      }
      for (int64_t depth = 0; depth < p.columns; depth += kDepth) {
        const int64_t count = std::min(kDepth, p.columns - depth);
        for (int64_t n = 0; n < panel_count; ++n) {
          for (int64_t i = 0; i < used; i += kFeedbackColumns) {
            const float* hessian = hessian_entries(p, range, depth, i);
            multiply_add(hessian, kFeedbackColumns, panels[n].errors + depth * kPanelWidth, count,
                         panels[n].gradient + i * kPanelWidth);
          }
        }
      }
      for (int64_t n = 0; n < panel_count; ++n) polish_panel(p, scratch, panels[n], range);
    }
    changed = false;
    for (int64_t n = 0; n < panel_count; ++n) changed |= panels[n].changed;
  }
}

}  // namespace gptq
}  // namespace
}  // namespace halfbyte
