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

}  // namespace halfbyte::reference
