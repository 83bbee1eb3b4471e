#include "gptq_reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "elementwise_reference.h"

namespace halfbyte::reference {

void hessian(const HessianInput& input, double* matrix) {
  for (int64_t t = 0; t < input.tokens; ++t) {
    for (int64_t i = 0; i < input.features; ++i) {
      for (int64_t j = 0; j < input.features; ++j) {
        const double left = to_float(input.x, input.type, t * input.features + i);
        matrix[i * input.features + j] += left * to_float(input.x, input.type, t * input.features + j);
      }
    }
  }
}

void gptq_round(const RoundProblem& p, uint8_t* codes, double* loss, double* tie) {
  const SearchOptions& options = p.options;
  const double half = 1 << (options.bits - 1);
  const double lowest = !options.symmetric ? 0.0 : options.narrow_range ? 1.0 - half : -half;
  const double highest = options.symmetric ? half - 1.0 : 2.0 * half - 1.0;
  const int64_t groups = p.columns / p.group_size;
  std::vector<double> errors(static_cast<size_t>(p.slots));
  for (int64_t row = 0; row < p.rows; ++row) {
    loss[row] = 0;
    tie[row] = 1;
    for (int64_t s = 0; s < p.slots; ++s) {
      const int64_t column = p.column_of_slot[s];
      double& error = errors[static_cast<size_t>(s)];
      error = 0;
      if (column < 0) continue;
      const double w = to_float(p.weight, p.weight_type, row * p.columns + column);
      double target = w;
      for (int64_t j = 0; j < s; ++j) {
        const int64_t at = feedback_offset(s / kFeedbackColumns) + j * kFeedbackColumns + s % kFeedbackColumns;
        target += errors[static_cast<size_t>(j)] * static_cast<double>(p.feedback[at]);
      }
      const double scale = p.scale[row * groups + column / p.group_size];
      const double zero = p.zero_point[row * groups + column / p.group_size];
      const double steps = target / scale;
      double code, rounded;
      if (options.codebook != nullptr) {
        const auto distance = [&](int i) { return std::fabs(steps - static_cast<double>(options.codebook[i])); };
        int nearest = 0;
        double other = 1e300;
        for (int i = 1; i < options.codebook_entries; ++i) {
          if (distance(i) < distance(nearest)) nearest = i;
        }
        for (int i = 0; i < options.codebook_entries; ++i) {
          if (i != nearest) other = std::min(other, distance(i));
        }
        code = nearest;
        rounded = static_cast<double>(options.codebook[nearest]) * scale;
        tie[row] = std::min(tie[row], 0.5 * (other - distance(nearest)));
      } else if (options.symmetric && options.bits == 1) {
        code = target >= 0 ? 1 : 0;
        rounded = (2 * code - 1) * scale;
        tie[row] = std::min(tie[row], std::fabs(steps));
      } else {
        code = std::clamp(std::nearbyint(steps), lowest - zero, highest - zero) + zero;
        rounded = (code - zero) * scale;
        tie[row] = std::min(tie[row], std::fabs(steps - std::floor(steps) - 0.5));
      }
      error = w - rounded;
      loss[row] += (target - rounded) * (target - rounded) * static_cast<double>(p.pivot[s]);
      codes[row * p.columns + column] = static_cast<uint8_t>(static_cast<int32_t>(code));
    }
  }
}

namespace {

// The multiple of the scale that a code means.
double step_of(const SearchOptions& options, uint8_t code, int32_t zero_point) {
  if (options.symmetric && options.bits == 1) return code != 0 ? 1 : -1;
  return options.symmetric ? static_cast<double>(static_cast<int8_t>(code)) : static_cast<double>(code - zero_point);
}

}  // namespace

double quadratic_error(const PolishProblem& p, const double* hessian, int64_t row, const double* scale,
                       const int32_t* zero_point, const uint8_t* codes) {
  const int64_t groups = p.columns / p.group_size;
  std::vector<double> errors(static_cast<size_t>(p.columns));
  for (int64_t k = 0; k < p.columns; ++k) {
    const int64_t at = row * groups + k / p.group_size;
    errors[static_cast<size_t>(k)] = to_float(p.weight, p.weight_type, row * p.columns + k) -
                                     step_of(p.options, codes[row * p.columns + k], zero_point[at]) * scale[at];
  }
  double total = 0;
  for (int64_t j = 0; j < p.columns; ++j) {
    for (int64_t k = 0; k < p.columns; ++k) {
      total += errors[static_cast<size_t>(j)] * hessian[j * p.columns + k] * errors[static_cast<size_t>(k)];
    }
  }
  return total;
}

void gptq_polish(const PolishProblem& p, const double* hessian, double* scale, int32_t* zero_point, uint8_t* codes) {
  const SearchOptions& options = p.options;
  const int half = 1 << (options.bits - 1);
  const bool binary = options.symmetric && options.bits == 1;
  const int lowest = binary || !options.symmetric ? 0 : options.narrow_range ? 1 - half : -half;
  const int highest = binary ? 1 : options.symmetric ? half - 1 : 2 * half - 1;
  const int64_t groups = p.columns / p.group_size;
  std::copy(p.scale, p.scale + p.rows * groups, scale);
  std::copy(p.zero_point, p.zero_point + p.rows * groups, zero_point);
  std::copy(p.codes, p.codes + p.rows * p.columns, codes);
  for (int64_t row = 0; row < p.rows; ++row) {
    const auto error = [&] { return quadratic_error(p, hessian, row, scale, zero_point, codes); };
    for (int sweep = 0; sweep < p.sweeps; ++sweep) {
      for (int64_t g = 0; g < groups; ++g) {
        double& s = scale[row * groups + g];
        for (int64_t k = row * p.columns + g * p.group_size; k < row * p.columns + (g + 1) * p.group_size; ++k) {
          uint8_t best = codes[k];
          double least = error();
          for (int code = lowest; code <= highest; ++code) {
            codes[k] = static_cast<uint8_t>(code);
            if (const double here = error(); here < least) least = here, best = static_cast<uint8_t>(code);
          }
          codes[k] = best;
        }
        if (!p.refit) continue;
        // A parabola through three points has its minimum where the best scale is.
        const double at = s, here = error();
        s = at * 1.25;
        const double above = error();
        s = at * 0.75;
        const double below = error(), curvature = above + below - 2 * here;
        s = curvature > 0 ? at + 0.25 * at * (below - above) / (2 * curvature) : at;
        if (!(s > 0 && error() < here)) s = at;
        if (options.symmetric) continue;
        int32_t& zero = zero_point[row * groups + g];
        const int32_t before = zero;
        int32_t best = zero;
        double least = error();
        for (const int32_t other : {before - 1, before + 1}) {
          // The codes keep their values, so what they mean moves by one step.
          zero = other;
          if (other < 0 || other > highest) continue;
          if (const double value = error(); value < least) least = value, best = other;
        }
        zero = best;
      }
    }
  }
}

}  // namespace halfbyte::reference
