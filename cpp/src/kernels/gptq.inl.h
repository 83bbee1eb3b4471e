// Rounds rows of a weight column by column, feeding errors back (gptq.h has the formulas).
//
// 48 rows make a panel, held as [slot][48] floats, so that a column is three vectors of 16 rows. A panel starts as the
// weights; a slot's error takes its place once it is rounded. Before a block of up to 128 slots, the errors of all
// slots before it are fed back by register-blocked products: nearly all of the work, bound by the FMA units. A task has
// several panels, so that a chunk of factors read from memory serves them all. Inside a block a slot's error goes at
// once to the rest of its 32 slots, bound by stores, and the errors of those 32 by a product to the rest of the block.
#pragma once
#include "polish.inl.h"

namespace halfbyte {
namespace {
namespace gptq {

// Everything a task needs beside the problem, carved out of its scratch.
struct RoundScratch {
  float* errors;    // [panels][slots][48]: weights, then errors
  float* targets;   // [panels][longest_range][48]
  float* scale;     // [panels][groups][48]
  float* zero;      // [panels][groups][48]
  float* expected;  // [group_size][48]: one group's weights before its scale is known
  float* row;       // [columns]: one row as float32, or one group's targets
  float* weights;   // [group_size]: one group's importance
  uint8_t* codes;   // [128][48]
  int64_t bytes;

  RoundScratch(const RoundProblem& p, int64_t rows, void* memory) {
    const int64_t panels = ceil_div(rows, kPanelWidth), groups = p.columns / p.group_size;
    auto* base = static_cast<char*>(memory);
    bytes = 0;
    const auto take = [&](int64_t count, int64_t size) {
      char* at = base == nullptr ? nullptr : base + bytes;
      bytes += round_up(count * size, 64);
      return at;
    };
    const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count, sizeof(float))); };
    errors = take_floats(panels * p.slots * kPanelWidth);
    targets = take_floats(panels * p.longest_range * kPanelWidth);
    scale = take_floats(panels * groups * kPanelWidth);
    zero = take_floats(panels * groups * kPanelWidth);
    expected = take_floats(p.search ? p.group_size * kPanelWidth : 0);
    row = take_floats(std::max(p.columns, groups));
    weights = take_floats(p.group_size);
    codes = reinterpret_cast<uint8_t*>(take(kRoundBlock * kPanelWidth, 1));
  }
};

// One panel of a task: rows [row, row + rows) of the weight, rows <= 48; past them weights are zero.
struct Panel {
  int64_t row, rows;
  float *errors, *targets, *scale, *zero;
};

inline void load_panel(const RoundProblem& p, const RoundScratch& scratch, const Panel& panel) {
  std::memset(panel.errors, 0, sizeof(float) * static_cast<size_t>(p.slots * kPanelWidth));
  const int64_t element = p.weight_type == FloatType::kFloat32 ? 4 : 2;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const char* in = static_cast<const char*>(p.weight) + (panel.row + r) * p.columns * element;
    e::with_type(p.weight_type, [&]<FloatType Type>() { e::to_float<Type>(in, scratch.row, p.columns); });
    for (int64_t s = 0; s < p.slots; ++s) {
      if (p.column_of_slot[s] >= 0) panel.errors[s * kPanelWidth + r] = scratch.row[p.column_of_slot[s]];
    }
  }
  const int64_t groups = p.columns / p.group_size;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < kPanelWidth; ++r) {
      const bool given = !p.search && r < panel.rows;
      panel.scale[g * kPanelWidth + r] = given ? p.scale[(panel.row + r) * groups + g] : 1.f;
      panel.zero[g * kPanelWidth + r] = given ? static_cast<float>(p.zero_point[(panel.row + r) * groups + g]) : 0.f;
    }
  }
}

// Targets of slots [begin, end) += products of the errors of slots [from, to) with their factors, for every panel.
// `base` is the slot of targets[0].
inline void feed_back(const RoundProblem& p, const Panel* panels, int64_t panel_count, int64_t base, int64_t begin,
                      int64_t end, int64_t from, int64_t to) {
  for (int64_t depth = from; depth < to; depth += kDepth) {
    const int64_t count = std::min(kDepth, to - depth);
    for (int64_t n = 0; n < panel_count; ++n) {
      const float* errors = panels[n].errors + depth * kPanelWidth;
      for (int64_t s = begin; s < end; s += kFeedbackColumns) {
        const float* factors = p.feedback + feedback_offset(s / kFeedbackColumns) + depth * kFeedbackColumns;
        multiply_add(factors, kFeedbackColumns, errors, count, panels[n].targets + (s - base) * kPanelWidth);
      }
    }
  }
}

inline float feedback_factor(const RoundProblem& p, int64_t from, int64_t to) {
  return p.feedback[feedback_offset(to / kFeedbackColumns) + from * kFeedbackColumns + to % kFeedbackColumns];
}

// Chooses the scale of the group whose first slot is `first`, for every row of the panel. The weights to be covered are
// those that lose least given all errors so far, which is where the targets end up if the slots of the group before
// them are rounded without error: u[k] = target[k] + sum over j in the group, j < k, of (w[j] - u[j]) * factor[j, k].
inline void search_group(const RoundProblem& p, const RoundScratch& scratch, const Panel& panel, int64_t base,
                         int64_t first) {
  const int64_t groups = p.columns / p.group_size, group = p.column_of_slot[first] / p.group_size;
  std::memcpy(scratch.expected, panel.targets + (first - base) * kPanelWidth,
              sizeof(float) * static_cast<size_t>(p.group_size * kPanelWidth));
  for (int64_t j = 0; first > 0 && j < p.group_size; ++j) {
    alignas(64) float moved[kPanelWidth];
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      moved[i] = panel.errors[(first + j) * kPanelWidth + i] - scratch.expected[j * kPanelWidth + i];
    }
    for (int64_t k = j + 1; k < p.group_size; ++k) {
      add_scaled(feedback_factor(p, first + j, first + k), moved, scratch.expected + k * kPanelWidth);
    }
  }
  if (p.importance != nullptr) {
    for (int64_t i = 0; i < p.group_size; ++i) scratch.weights[i] = p.importance[p.column_of_slot[first + i]];
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    for (int64_t i = 0; i < p.group_size; ++i) scratch.row[i] = scratch.expected[i * kPanelWidth + r];
    const int64_t at = (panel.row + r) * groups + group;
    float loss;
    e::search_qparams(scratch.row, p.importance == nullptr ? nullptr : scratch.weights, p.group_size, p.options,
                      p.scale + at, p.zero_point + at, &loss);
    panel.scale[group * kPanelWidth + r] = p.scale[at];
    panel.zero[group * kPanelWidth + r] = static_cast<float>(p.zero_point[at]);
  }
}

// Slots [begin, end) of a block whose errors go to one another at once. Where a scale is searched for, all targets of
// its group must be up to date by then, so that groups must not begin in the midst of such slots and end after them.
inline int64_t slots_at_once(const RoundProblem& p) {
  constexpr int64_t kSlots = 32;
  const bool aligned = !p.search || p.group_size % kSlots == 0 || kSlots % p.group_size == 0;
  return aligned ? kSlots : kRoundBlock;
}

// Rounds slots [begin, end) of a block.
inline void round_slots(const RoundProblem& p, const RoundScratch& scratch, const Panel& panel, const RoundBlock& block,
                        int64_t begin, int64_t end, float* losses) {
  const CodeLimits limits = code_limits(p.options);
  const e::Lanes lowest = e::broadcast(limits.lowest), highest = e::broadcast(limits.highest);
  const e::Lanes one = e::broadcast(1.f), zero = e::broadcast(0.f);
  const bool has_codebook = p.options.codebook != nullptr;
  const e::Codebook codebook(p.options);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t column = p.column_of_slot[s];
    if (column < 0) continue;  // its error is the zero it was loaded with
    const int64_t group = column / p.group_size;
    const bool first = s == 0 || p.column_of_slot[s - 1] < 0 || p.column_of_slot[s - 1] / p.group_size != group;
    if (p.search && first) search_group(p, scratch, panel, block.range_begin, s);
    float* targets = panel.targets + (s - block.range_begin) * kPanelWidth;
    float* errors = panel.errors + s * kPanelWidth;
    const e::Lanes pivot = e::broadcast(p.pivot[s]);
    for (int64_t lanes = 0; lanes < kPanelLanes; ++lanes) {
      const int64_t at = lanes * e::kLanes;
      const e::Lanes target = e::load(targets + at);
      const e::Lanes scale = e::load(panel.scale + group * kPanelWidth + at);
      const e::Lanes center = e::load(panel.zero + group * kPanelWidth + at);
      e::Lanes code, rounded;
      if (has_codebook) {
        e::Lanes inverse;
        for (int b = 0; b < e::kBatches; ++b) inverse.batch[b] = one.batch[b] / scale.batch[b];
        const e::Nearest nearest = codebook.nearest(target * inverse);
        code = nearest.code;
        rounded = nearest.value * scale;
      } else if (limits.binary) {
        float signs[e::kLanes];
        e::store(signs, target);
        for (float& sign : signs) sign = sign >= 0.f ? 1.f : -1.f;
        code = e::load(signs);
        rounded = code * scale;
      } else {
        e::Lanes inverse;
        for (int b = 0; b < e::kBatches; ++b) inverse.batch[b] = one.batch[b] / scale.batch[b];
        code = e::round_small(e::clamp(target * inverse, lowest - center, highest - center));
        rounded = code * scale;
      }
      e::store(errors + at, e::load(errors + at) - rounded);
      const e::Lanes lost = target - rounded;
      e::store(losses + at, e::load(losses + at) + pivot * (lost * lost));
      e::store_codes(scratch.codes + (s - block.begin) * kPanelWidth + at,
                     limits.binary ? e::max(code, zero) : code + center);
    }
    for (int64_t later = s + 1; later < end; ++later) {
      add_scaled(feedback_factor(p, s, later), errors, panel.targets + (later - block.range_begin) * kPanelWidth);
    }
  }
}

inline void round_block(const RoundProblem& p, const RoundScratch& scratch, const Panel& panel, const RoundBlock& block,
                        float* losses) {
  const int64_t at_once = slots_at_once(p);
  for (int64_t begin = block.begin; begin < block.end; begin += at_once) {
    const int64_t end = std::min(begin + at_once, block.end);
    round_slots(p, scratch, panel, block, begin, end, losses);
    feed_back(p, &panel, 1, block.range_begin, end, block.end, begin, end);
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    uint8_t* out = p.codes + (panel.row + r) * p.columns;
    for (int64_t s = block.begin; s < block.end; ++s) {
      if (p.column_of_slot[s] >= 0) out[p.column_of_slot[s]] = scratch.codes[(s - block.begin) * kPanelWidth + r];
    }
  }
}

inline void round_rows(const RoundProblem& p, int64_t row_begin, int64_t row_end, void* memory) {
  const RoundScratch scratch(p, row_end - row_begin, memory);
  const int64_t groups = p.columns / p.group_size;
  Panel panels[kRoundPanels];
  alignas(64) float losses[kRoundPanels][kPanelWidth] = {};
  int64_t panel_count = 0;
  for (int64_t row = row_begin; row < row_end; row += kPanelWidth, ++panel_count) {
    panels[panel_count] = {.row = row,
                           .rows = std::min(kPanelWidth, row_end - row),
                           .errors = scratch.errors + panel_count * p.slots * kPanelWidth,
                           .targets = scratch.targets + panel_count * p.longest_range * kPanelWidth,
                           .scale = scratch.scale + panel_count * groups * kPanelWidth,
                           .zero = scratch.zero + panel_count * groups * kPanelWidth};
    load_panel(p, scratch, panels[panel_count]);
  }
  for (int64_t b = 0; b < p.block_count; ++b) {
    const RoundBlock& block = p.blocks[b];
    if (block.begin == block.range_begin) {
      const int64_t length = block.range_end - block.range_begin;
      for (int64_t n = 0; n < panel_count; ++n) {
        std::memcpy(panels[n].targets, panels[n].errors + block.begin * kPanelWidth,
                    sizeof(float) * static_cast<size_t>(length * kPanelWidth));
      }
      feed_back(p, panels, panel_count, block.range_begin, block.range_begin, block.range_end, 0, block.begin);
    } else {
      feed_back(p, panels, panel_count, block.range_begin, block.begin, block.end, block.range_begin, block.begin);
    }
    for (int64_t n = 0; n < panel_count; ++n) round_block(p, scratch, panels[n], block, losses[n]);
  }
  for (int64_t n = 0; n < panel_count; ++n) {
    std::memcpy(p.loss + panels[n].row, losses[n], sizeof(float) * static_cast<size_t>(panels[n].rows));
  }
}

}  // namespace gptq

constexpr GptqKernels gptq_kernels() {
  return {
      .hessian_block =
          [](const HessianInput& input, const PanelBlock& block, double* tiles, float* scratch) {
            elementwise::with_type(input.type,
                                   [&]<FloatType T>() { gptq::hessian_block<T>(input, block, tiles, scratch); });
          },
      .hessian_scratch = gptq::kHessianScratch,
      .round_rows = gptq::round_rows,
      .round_scratch = [](const RoundProblem& p, int64_t rows) { return gptq::RoundScratch(p, rows, nullptr).bytes; },
      .polish_rows = gptq::polish_rows,
      .polish_scratch = [](const PolishProblem& p,
                           int64_t rows) { return gptq::PolishScratch(p, rows, nullptr).bytes; },
  };
}

}  // namespace
}  // namespace halfbyte
