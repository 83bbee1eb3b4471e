// The gradients of learned fake-quantize, codebooks and the histogram: every supported level against plain loops, bit
// for bit, over types, granularities, awkward lengths, NaN, infinities and values at the ends of the range.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "elementwise_reference.h"
#include "halfbyte/dispatch.h"
#include "testing.h"
#include "training_reference.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

Bytes random_floats(int64_t count, FloatType type, float spread, bool specials) {
  const float special[] = {kInf, -kInf, 0.f, -0.f, 1e30f, -1e30f, 0.5f, 1e-40f, 2.5f, kNaN};
  Bytes bytes(static_cast<size_t>(count) * bytes_of(type));
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_unit() * spread;
    reference::from_float(specials && i % 7 == 3 ? special[i / 7 % 10] : value, bytes.data(), type, i);
  }
  return bytes;
}

struct Case {
  Bytes x, grad, expected, got;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  AffineGrid grid;
  Case(int64_t count, int64_t channels, int64_t run_length, FloatType type, int32_t qmin, int32_t qmax, bool specials)
      : x(random_floats(count, type, 30.f, specials)),
        grad(random_floats(count, type, 2.f, false)),
        expected(x.size()),
        got(x.size(), 0xff) {
    for (int64_t c = 0; c < channels; ++c) {
      scale.push_back(std::exp2(random_unit() * 4.f) * 0.3f);
      zero_point.push_back(qmin + static_cast<int32_t>((random_unit() + 1.f) * 0.5f * static_cast<float>(qmax - qmin)));
    }
    grid = {scale.data(), zero_point.data(), channels, run_length, qmin, qmax, nullptr};
  }
};

void check_runs(const TrainingKernels& kernels, FloatType type, Estimator estimator, int64_t runs, int64_t channels,
                int64_t run_length, bool specials) {
  Case c(runs * run_length, channels, run_length, type, -8, 7, specials);
  const int64_t blocks = ceil_div(run_length, kGradientBlock), count = runs * blocks;
  std::vector<float> scale(static_cast<size_t>(count)), zero_point(scale);
  for (const auto& [begin, end] : {std::pair{int64_t{0}, count / 3}, {count / 3, count}}) {
    kernels.learned_gradient_runs(c.x.data(), c.grad.data(), c.got.data(), type, c.grid, estimator, begin, end,
                                  {scale.data(), zero_point.data()});
  }
  for (int64_t block = 0; block < count; ++block) {
    const int64_t run = block / blocks, offset = block % blocks * kGradientBlock;
    const auto channel = static_cast<size_t>(run % channels);
    const reference::BlockSums sums = reference::learned_gradient(
        c.x.data(), c.grad.data(), c.expected.data(), type, run * run_length + offset,
        std::min(kGradientBlock, run_length - offset), c.scale[channel], c.zero_point[channel], -8, 7, estimator);
    CHECK(same_bits(sums.scale, scale[static_cast<size_t>(block)]) &&
              same_bits(sums.zero_point, zero_point[static_cast<size_t>(block)]),
          "type %d, %d runs of %d, block %d: %a and %a, not %a and %a", int(type), int(runs), int(run_length),
          int(block), double(scale[static_cast<size_t>(block)]), double(zero_point[static_cast<size_t>(block)]),
          double(sums.scale), double(sums.zero_point));
  }
  CHECK(c.got == c.expected, "grad_x, type %d, %d runs of %d", int(type), int(runs), int(run_length));
}

void check_columns(const TrainingKernels& kernels, FloatType type, Estimator estimator, int64_t count, int64_t columns,
                   bool specials) {
  Case c(count, columns, 1, type, 0, 255, specials);
  const auto padded = static_cast<size_t>(round_up(columns, kElementLanes) + kElementLanes);
  std::vector<float> inverse(padded), lowest(padded), highest(padded), scale(padded, kNaN), zero_point(padded, kNaN);
  for (size_t i = 0; i < static_cast<size_t>(columns); ++i) {
    inverse[i] = 1.f / c.scale[i];
    lowest[i] = static_cast<float>(-c.zero_point[i]);
    highest[i] = static_cast<float>(255 - c.zero_point[i]);
  }
  const ColumnGrid grid = {inverse.data(), lowest.data(), highest.data()};
  const int64_t rows = ceil_div(count, columns), cut = columns / 2 / kElementLanes * kElementLanes;
  std::vector<reference::BlockSums> sums(static_cast<size_t>(columns));
  for (const auto& [row_begin, row_end] : {std::pair{int64_t{0}, rows / 2}, {rows / 2, rows}}) {
    for (const auto& [begin, end] : {std::pair{int64_t{0}, cut}, {cut, columns}}) {
      kernels.learned_gradient_columns(c.x.data(), c.grad.data(), c.got.data(), type, grid, estimator, count, columns,
                                       row_begin, row_end, begin, end, {scale.data(), zero_point.data()});
    }
    std::fill(sums.begin(), sums.end(), reference::BlockSums{0.f, 0.f});
    for (int64_t i = row_begin * columns; i < std::min(count, row_end * columns); ++i) {
      const auto column = static_cast<size_t>(i % columns);
      reference::add_learned_gradient(c.x.data(), c.grad.data(), c.expected.data(), type, i, c.scale[column],
                                      c.zero_point[column], 0, 255, estimator, sums[column]);
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      CHECK(same_bits(sums[i].scale, scale[i]) && same_bits(sums[i].zero_point, zero_point[i]),
            "type %d, %d elements in %d columns, column %d: %a and %a, not %a and %a", int(type), int(count),
            int(columns), int(i), double(scale[i]), double(zero_point[i]), double(sums[i].scale),
            double(sums[i].zero_point));
    }
  }
  CHECK(c.got == c.expected, "grad_x, type %d, %d elements in %d columns", int(type), int(count), int(columns));
}

void check_codebook(const TrainingKernels& kernels, FloatType type, const std::vector<float>& values, bool binary,
                    float clip, int64_t run_length, bool specials) {
  constexpr int64_t kRuns = 5;
  Case c(kRuns * run_length, kRuns, run_length, type, 0, 1, specials);
  const CodebookGrid grid = {c.scale.data(), values.data(), static_cast<int>(values.size()), binary, -clip,
                             clip,           run_length};
  const int64_t blocks = ceil_div(run_length, kGradientBlock), count = kRuns * blocks;
  std::vector<float> sums(static_cast<size_t>(count));
  Bytes rounded(c.x.size()), expected(c.x.size());
  for (const auto& [begin, end] : {std::pair{int64_t{0}, int64_t{2}}, {int64_t{2}, kRuns}}) {
    kernels.codebook_fake_quantize(c.x.data(), rounded.data(), type, grid, begin, end);
    kernels.codebook_gradient(c.x.data(), c.grad.data(), c.got.data(), type, grid, begin * blocks, end * blocks,
                              sums.data());
  }
  for (int64_t block = 0; block < count; ++block) {
    const int64_t run = block / blocks, offset = block % blocks * kGradientBlock, begin = run * run_length + offset;
    const int64_t length = std::min(kGradientBlock, run_length - offset);
    const float scale = c.scale[static_cast<size_t>(run)];
    for (int64_t i = begin; i < begin + length; ++i) {
      reference::from_float(reference::codebook_entry(reference::to_float(c.x.data(), type, i), scale, grid) * scale,
                            expected.data(), type, i);
    }
    const float sum =
        reference::codebook_gradient(c.x.data(), c.grad.data(), c.expected.data(), type, begin, length, scale, grid);
    CHECK(same_bits(sum, sums[static_cast<size_t>(block)]), "codebook of %d, type %d, runs of %d, block %d: %a, not %a",
          int(values.size()), int(type), int(run_length), int(block), double(sums[static_cast<size_t>(block)]),
          double(sum));
  }
  CHECK(rounded == expected, "codebook of %d, type %d, runs of %d", int(values.size()), int(type), int(run_length));
  CHECK(c.got == c.expected, "grad_x, codebook of %d, type %d, runs of %d", int(values.size()), int(type),
        int(run_length));
}

void check_histogram(const HistogramKernels& kernels, FloatType type, int64_t count, int64_t bins, bool specials) {
  const Bytes x = random_floats(count, type, 5.f, specials);
  const HistogramRange range = {-4.f, static_cast<float>(bins) / 7.f, bins};
  std::vector<uint32_t> copies(static_cast<size_t>(kHistogramCopies * bins));
  std::vector<uint64_t> expected(static_cast<size_t>(bins)), got(expected);
  const int64_t nans = reference::count_histogram(x.data(), type, count, range, expected.data());
  CHECK(kernels.count(x.data(), type, count, range, copies.data()) == nans, "NaN, type %d, count %d, %d bins",
        int(type), int(count), int(bins));
  for (size_t i = 0; i < copies.size(); ++i) got[i % got.size()] += copies[i];
  CHECK(got == expected, "histogram, type %d, count %d, %d bins", int(type), int(count), int(bins));
}

}  // namespace

int main() {
  for (const std::string& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const KernelTable& active = kernels();
    for (FloatType type : kFloatTypes) {
      for (bool specials : {false, true}) {
        for (Estimator estimator : {Estimator::kRounded, Estimator::kLsq, Estimator::kPact}) {
          for (int64_t run_length : {1, 15, 16, 17, 32, 100, 4095, 4096, 4097, 9000}) {
            check_runs(active.training, type, estimator, 7, 1, run_length, specials);
            check_runs(active.training, type, estimator, 7, 3, run_length, specials);
            check_runs(active.training, type, estimator, 7, 7, run_length, specials);
          }
          for (int64_t columns : {1, 15, 16, 17, 48, 100, 600}) {
            for (int64_t count : {columns, 2 * columns, 9 * columns, 9 * columns + columns / 2, 300 * columns}) {
              check_columns(active.training, type, estimator, count, columns, specials);
            }
          }
        }
        for (int64_t run_length : {1, 15, 16, 17, 32, 100, 4097, 9000}) {
          check_codebook(active.training, type, {-1.f, 1.f}, true, 1.f, run_length, specials);
          check_codebook(active.training, type, {-0.75f, -0.25f, 0.25f, 0.75f}, false, 0.99f, run_length, specials);
          check_codebook(active.training, type,
                         {-6.f, -4.f, -3.f, -2.f, -1.5f, -1.f, -0.5f, 0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, 7.f},
                         false, 7.5f, run_length, specials);
        }
        for (int64_t bins : {1, 2, 64, 2048, 3001}) {
          for (int64_t count : {0, 1, 15, 16, 17, 1000, 20000}) {
            check_histogram(active.histogram, type, count, bins, specials);
          }
        }
      }
    }
  }
  std::puts("training: every supported level equals the reference");
}
