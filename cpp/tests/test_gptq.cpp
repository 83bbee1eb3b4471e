// Every level's Hessian sums and GPTQ rounding against the float64 loops of gptq_reference.cpp, and the levels with
// fused multiply-add against each other, bit for bit. Buffers have exactly the right size, for AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <vector>

#include "elementwise_reference.h"
#include "gptq_reference.h"
#include "halfbyte/dispatch.h"
#include "testing.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

Bytes random_floats(int64_t count, FloatType type) {
  Bytes bytes(static_cast<size_t>(count) * bytes_of(type));
  for (int64_t i = 0; i < count; ++i) reference::from_float(random_unit(), bytes.data(), type, i);
  return bytes;
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
std::unique_ptr<void, Free> aligned(int64_t bytes) {
  return std::unique_ptr<void, Free>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
}

void check_hessian(int64_t tokens, int64_t features, FloatType type) {
  const auto x = random_floats(tokens * features, type);
  const HessianInput input = {x.data(), type, tokens, features};
  std::vector<double> expected(static_cast<size_t>(features * features));
  reference::hessian(input, expected.data());
  const int64_t panels = ceil_div(features, kPanelWidth);
  std::vector<double> fused;
  for (const auto& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const GptqKernels& kernel = kernels().gptq;
    std::vector<double> tiles(static_cast<size_t>(hessian_tiles(features) * kPanelWidth * kPanelWidth));
    const auto scratch = aligned(kernel.hessian_scratch * 4);
    for (int64_t i = 0; i < panels; i += 3) {
      for (int64_t j = 0; j <= i; j += 3) {
        const PanelBlock block = {i, std::min(i + 3, panels), j, std::min(j + 3, panels)};
        kernel.hessian_block(input, block, tiles.data(), static_cast<float*>(scratch.get()));
      }
    }
    for (int64_t i = 0; i < features; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const int64_t row = i / kPanelWidth, column = j / kPanelWidth;
        const int64_t tile = row * (row + 1) / 2 + column;
        const double sum =
            tiles[static_cast<size_t>((tile * kPanelWidth + i % kPanelWidth) * kPanelWidth + j % kPanelWidth)];
        const double difference = std::fabs(sum - expected[static_cast<size_t>(i * features + j)]);
        CHECK(difference <= 1e-6 * static_cast<double>(tokens), "[%d, %d] of %d: %g", static_cast<int>(i),
              static_cast<int>(j), static_cast<int>(features), difference);
      }
    }
    if (name == "scalar") continue;
    CHECK(fused.empty() || fused == tiles, "differs from another level at %d features", static_cast<int>(features));
    fused = tiles;
  }
}

struct Format {
  int bits;
  bool symmetric, narrow_range;
  std::vector<float> codebook = {};
};

void check_round(int64_t rows, int64_t columns, int64_t group_size, const Format& format, FloatType type) {
  const int64_t slots = round_up(columns, kFeedbackColumns), groups = columns / group_size;
  const auto weight = random_floats(rows * columns, type);
  std::vector<int32_t> column_of_slot(static_cast<size_t>(slots), -1);
  for (int64_t s = 0; s < columns; ++s) column_of_slot[static_cast<size_t>(s)] = static_cast<int32_t>(columns - 1 - s);
  std::vector<RoundBlock> blocks;
  for (int64_t begin = 0; begin < slots; begin += kRoundBlock) {
    const int64_t end = std::min(begin + kRoundBlock, slots);
    blocks.push_back({begin, end, begin, end});
  }
  std::vector<float> feedback(static_cast<size_t>(feedback_offset(slots / kFeedbackColumns)));
  std::vector<float> pivot(static_cast<size_t>(slots));
  for (int64_t k = 0; k < columns; ++k) {
    pivot[static_cast<size_t>(k)] = 1.5f + random_unit();
    for (int64_t j = 0; j < k; ++j) {
      const int64_t at = feedback_offset(k / kFeedbackColumns) + j * kFeedbackColumns + k % kFeedbackColumns;
      feedback[static_cast<size_t>(at)] = random_unit() * 0.2f;
    }
  }
  std::vector<float> scale(static_cast<size_t>(rows * groups));
  std::vector<int32_t> zero_point(static_cast<size_t>(rows * groups));
  for (float& s : scale) s = (1.5f + random_unit()) / static_cast<float>(1 << format.bits);
  if (!format.symmetric) {
    for (int32_t& z : zero_point)
      z = static_cast<int32_t>((random_unit() + 1.f) * 0.5f * static_cast<float>((1 << format.bits) - 1));
  }
  std::vector<uint8_t> codes(static_cast<size_t>(rows * columns)), expected(codes.size());
  std::vector<float> loss(static_cast<size_t>(rows));
  std::vector<double> expected_loss(loss.size()), tie(loss.size());
  const RoundProblem problem = {.weight = weight.data(),
                                .weight_type = type,
                                .rows = rows,
                                .columns = columns,
                                .column_of_slot = column_of_slot.data(),
                                .slots = slots,
                                .blocks = blocks.data(),
                                .block_count = static_cast<int64_t>(blocks.size()),
                                .longest_range = std::min(slots, kRoundBlock),
                                .feedback = feedback.data(),
                                .pivot = pivot.data(),
                                .group_size = group_size,
                                .search = false,
                                .options = {.bits = format.bits,
                                            .symmetric = format.symmetric,
                                            .narrow_range = format.narrow_range,
                                            .steps = 1,
                                            .shrink_step = 0.f,
                                            .scale_type = FloatType::kFloat32,
                                            .codebook = format.codebook.empty() ? nullptr : format.codebook.data(),
                                            .codebook_entries = static_cast<int>(format.codebook.size())},
                                .importance = nullptr,
                                .scale = scale.data(),
                                .zero_point = zero_point.data(),
                                .codes = codes.data(),
                                .loss = loss.data()};
  reference::gptq_round(problem, expected.data(), expected_loss.data(), tie.data());
  std::vector<uint8_t> fused;
  for (const auto& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const GptqKernels& kernel = kernels().gptq;
    std::fill(codes.begin(), codes.end(), uint8_t{0xaa});
    for (int64_t row = 0; row < rows; row += kRoundPanels * kPanelWidth) {
      const int64_t end = std::min(row + kRoundPanels * kPanelWidth, rows);
      const auto scratch = aligned(kernel.round_scratch(problem, end - row));
      kernel.round_rows(problem, row, end, scratch.get());
    }
    int64_t decided = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (tie[static_cast<size_t>(row)] < 1e-4) continue;  // float32 may round the other way
      ++decided;
      for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
        CHECK(codes[static_cast<size_t>(i)] == expected[static_cast<size_t>(i)], "%d bits, row %d: %d, not %d",
              format.bits, static_cast<int>(row), codes[static_cast<size_t>(i)], expected[static_cast<size_t>(i)]);
      }
      const double wanted = expected_loss[static_cast<size_t>(row)];
      CHECK(std::fabs(loss[static_cast<size_t>(row)] - wanted) <= 1e-4 * wanted, "loss %g, not %g",
            static_cast<double>(loss[static_cast<size_t>(row)]), wanted);
    }
    CHECK(decided * 2 > rows, "too many ties");
    if (name == "scalar") continue;
    CHECK(fused.empty() || fused == codes, "differs from another level");
    fused = codes;
  }
}

// One sweep: each step of the descent has one best answer, so errors agree with the reference wherever no step was a
// tie; rows where one was may go another way, and end elsewhere.
void check_polish(int64_t rows, int64_t columns, int64_t group_size, const Format& format, FloatType type, bool refit) {
  const int64_t groups = columns / group_size, range = polish_range(group_size);
  const int64_t range_slots = round_up(range, kFeedbackColumns);
  const int64_t slots = columns / range * range_slots + round_up(columns - columns / range * range, kFeedbackColumns);
  const auto weight = random_floats(rows * columns, type);
  std::vector<double> hessian(static_cast<size_t>(columns * columns));
  std::vector<float> x(static_cast<size_t>(3 * columns * columns));
  for (float& value : x) value = random_unit();
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = i == j ? 0.1 : 0.0;
      for (int64_t t = 0; t < 3 * columns; ++t) {
        sum += static_cast<double>(x[static_cast<size_t>(t * columns + i)]) * x[static_cast<size_t>(t * columns + j)];
      }
      hessian[static_cast<size_t>(i * columns + j)] = static_cast<float>(sum);
    }
  }
  std::vector<float> panels(static_cast<size_t>(slots * columns));
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t slot = k / range * range_slots + k % range;
    for (int64_t j = 0; j < columns; ++j) {
      panels[static_cast<size_t>((slot / kFeedbackColumns * columns + j) * kFeedbackColumns +
                                 slot % kFeedbackColumns)] =
          static_cast<float>(hessian[static_cast<size_t>(j * columns + k)]);
    }
  }
  std::vector<float> scale(static_cast<size_t>(rows * groups)), first_scale;
  std::vector<int32_t> zero_point(scale.size()), first_zero_point;
  std::vector<uint8_t> codes(static_cast<size_t>(rows * columns)), first_codes;
  for (float& s : scale) s = (1.5f + random_unit()) / static_cast<float>(1 << format.bits);
  const int half = 1 << (format.bits - 1);
  for (int32_t& z : zero_point) z = format.symmetric ? 0 : half;
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>(format.symmetric && format.bits > 1 ? 0 : random_unit() > 0 ? half : half - 1);
  }
  first_scale = scale, first_zero_point = zero_point, first_codes = codes;
  const PolishProblem problem = {.weight = weight.data(),
                                 .weight_type = type,
                                 .rows = rows,
                                 .columns = columns,
                                 .hessian = panels.data(),
                                 .group_size = group_size,
                                 .options = {.bits = format.bits,
                                             .symmetric = format.symmetric,
                                             .narrow_range = format.narrow_range,
                                             .steps = 1,
                                             .shrink_step = 0.f,
                                             .scale_type = FloatType::kFloat32},
                                 .sweeps = 1,
                                 .refit = refit,
                                 .scale = scale.data(),
                                 .zero_point = zero_point.data(),
                                 .codes = codes.data()};
  std::vector<double> wanted_scale(scale.size());
  std::vector<int32_t> wanted_zero_point(scale.size());
  std::vector<uint8_t> wanted(codes.size()), fused;
  reference::gptq_polish(problem, hessian.data(), wanted_scale.data(), wanted_zero_point.data(), wanted.data());
  const std::vector<double> start(first_scale.begin(), first_scale.end());
  for (const auto& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    scale = first_scale, zero_point = first_zero_point, codes = first_codes;
    const GptqKernels& kernel = kernels().gptq;
    for (int64_t row = 0; row < rows; row += kRoundPanels * kPanelWidth) {
      const int64_t end = std::min(row + kRoundPanels * kPanelWidth, rows);
      const auto scratch = aligned(kernel.polish_scratch(problem, end - row));
      kernel.polish_rows(problem, row, end, scratch.get());
    }
    const std::vector<double> found(scale.begin(), scale.end());
    int64_t agree = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const auto error = [&](const auto& s, const auto& z, const auto& q) {
        return reference::quadratic_error(problem, hessian.data(), row, s.data(), z.data(), q.data());
      };
      const double before = error(start, first_zero_point, first_codes), after = error(found, zero_point, codes);
      const double expected = error(wanted_scale, wanted_zero_point, wanted);
      CHECK(after <= before * (1 + 1e-5), "row %d: %g from %g", static_cast<int>(row), after, before);
      agree += std::fabs(after - expected) <= 1e-3 * expected;
    }
    CHECK(agree * 10 >= rows * 9, "%d bits: %d of %d rows agree", format.bits, static_cast<int>(agree),
          static_cast<int>(rows));
    if (name == "scalar") continue;
    CHECK(fused.empty() || fused == codes, "differs from another level");
    fused = codes;
  }
}

}  // namespace

int main() {
  for (FloatType type : {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16}) {
    for (int64_t features : {1, 47, 48, 49, 200}) check_hessian(131, features, type);
    check_round(50, 72, 24, {4, false, false}, type);
  }
  check_hessian(0, 50, FloatType::kFloat32);
  for (int bits = 1; bits <= 8; ++bits) {
    check_round(100, 130, 26, {bits, false, false}, FloatType::kFloat32);
    check_round(250, 137, 137, {bits, true, false}, FloatType::kFloat32);
    if (bits > 1) check_round(17, 8, 4, {bits, true, true}, FloatType::kFloat32);
  }
  check_round(100, 130, 26, {4, true, false, {-7.f, -5.5f, -3.f, -1.f, -.5f, 0.f, .25f, 2.f, 3.f, 6.f}},
              FloatType::kFloat32);
  check_round(50, 72, 24, {1, true, false, {-.7f, 1.f}}, FloatType::kFloat32);
  for (int bits = 1; bits <= 4; ++bits) {
    check_polish(50, 30, 10, {bits, false, false}, FloatType::kFloat32, true);
    check_polish(20, 33, 33, {bits, true, bits > 1}, FloatType::kBFloat16, bits % 2 == 0);
  }
  check_polish(5, 140, 140, {3, false, false}, FloatType::kFloat32, true);
  check_polish(4, 150, 50, {2, true, false}, FloatType::kFloat16, true);
  std::puts("ok");
}
