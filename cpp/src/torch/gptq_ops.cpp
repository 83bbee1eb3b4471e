// hessian_update_, cross_hessian_update_, hessian_matrix, gptq_round: checks, the order of the columns, the factors as
// the kernel reads them, threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "aligned_scratch.h"
#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

void check_tiles(const Tensor& tiles, int64_t features) {
  check_type(tiles, ScalarType::Double, "tiles");
  check(tiles.is_contiguous() && tiles.dim() == 3 && tiles.size(0) == hessian_tiles(features) &&
            tiles.size(1) == kPanelWidth && tiles.size(2) == kPanelWidth,
        "tiles is not a contiguous tensor of ", hessian_tiles(features), " tiles of ", kPanelWidth, " by ", kPanelWidth,
        ", which ", features, " features need");
}

// Blocks of `side` by `side` tiles, which threads take one after another: large ones, since each reads its inputs from
// memory again, but at least eight a thread.
int64_t panels_per_block(int64_t panels) {
  const double threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(panels) / (4 * std::sqrt(threads))), 1,
                             kPanelsPerBlock);
}

// add(block, scratch) for every block; those on the diagonal, half the work, come last.
template <class Add>
void for_each_block(std::vector<PanelBlock> blocks, const Add& add) {
  std::stable_partition(blocks.begin(), blocks.end(),
                        [](const PanelBlock& block) { return block.row_begin != block.column_begin; });
  const auto count = static_cast<int64_t>(blocks.size());
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    const AlignedScratch scratch(kernels().gptq.hessian_scratch * static_cast<int64_t>(sizeof(float)));
    for (int64_t b = next++; b < count; b = next++) add(blocks[static_cast<size_t>(b)], scratch.floats());
  });
}

// Slots in visiting order, blocks and ranges.
struct Visit {
  std::vector<int32_t> column_of_slot;
  std::vector<RoundBlock> blocks;
  int64_t longest_range = 0;
};

// Without a search any cut will do. With one, a group must lie in one block or begin with one: blocks hold as many
// whole groups as fit, or a group is a range of several blocks.
Visit plan_visit(const int32_t* order, int64_t columns, int64_t group_size, bool search) {
  const bool wide = search && group_size > kRoundBlock;
  const int64_t range = wide ? group_size : search ? kRoundBlock / group_size * group_size : kRoundBlock;
  Visit visit;
  for (int64_t start = 0; start < columns; start += range) {
    const int64_t stop = std::min(start + range, columns);
    const auto range_begin = static_cast<int64_t>(visit.column_of_slot.size());
    const int64_t range_end = range_begin + round_up(stop - start, kFeedbackColumns);
    for (int64_t begin = range_begin; begin < range_end; begin += kRoundBlock) {
      visit.blocks.push_back({begin, std::min(begin + kRoundBlock, range_end), range_begin, range_end});
    }
    for (int64_t k = start; k < stop; ++k) visit.column_of_slot.push_back(order[k]);
    visit.column_of_slot.resize(static_cast<size_t>(range_end), -1);
    visit.longest_range = std::max(visit.longest_range, range_end - range_begin);
  }
  return visit;
}

}  // namespace

void hessian_update_(Tensor tiles, Tensor x) {
  const FloatType type = float_type(x, "x");
  check(x.dim() == 2 && x.size(1) >= 1, "x has ", x.dim(), " dimensions, not two, or no features");
  const int64_t tokens = x.size(0), features = x.size(1);
  check_tiles(tiles, features);
  const Tensor rows = as_contiguous(x);
  const int64_t panels = ceil_div(features, kPanelWidth), side = panels_per_block(panels);
  std::vector<PanelBlock> blocks;
  for (int64_t i = 0; i < panels; i += side) {
    for (int64_t j = 0; j <= i; j += side) {
      blocks.push_back({i, std::min(i + side, panels), j, std::min(j + side, panels)});
    }
  }
  const GptqKernels& kernel = kernels().gptq;
  const auto* in = static_cast<const char*>(rows.const_data_ptr());
  auto* sums = static_cast<double*>(tiles.mutable_data_ptr());
  const int64_t row_bytes = features * (type == FloatType::kFloat32 ? 4 : 2);
  for_each_block(std::move(blocks), [&](const PanelBlock& block, float* scratch) {
    for (int64_t first = 0; first < tokens; first += kTokenChunk) {
      const HessianInput input = {in + first * row_bytes, type, std::min(kTokenChunk, tokens - first), features};
      kernel.hessian_block(input, block, sums, scratch);
    }
  });
}

void cross_hessian_update_(Tensor matrix, Tensor y, Tensor x) {
  const FloatType type = float_type(x, "x");
  check(x.dim() == 2 && x.size(1) >= 1, "x has ", x.dim(), " dimensions, not two, or no features");
  const int64_t tokens = x.size(0), features = x.size(1);
  check_type(y, x.scalar_type(), "y");
  check_matrix(y, "y", tokens, features);
  check_type(matrix, ScalarType::Double, "matrix");
  check_matrix(matrix, "matrix", features, features);
  check(matrix.is_contiguous(), "matrix is not contiguous");
  const Tensor left = as_contiguous(y), right = as_contiguous(x);
  const int64_t panels = ceil_div(features, kPanelWidth), side = panels_per_block(panels);
  std::vector<PanelBlock> blocks;
  for (int64_t i = 0; i < panels; i += side) {
    for (int64_t j = 0; j < panels; j += side) {
      blocks.push_back({i, std::min(i + side, panels), j, std::min(j + side, panels)});
    }
  }
  const GptqKernels& kernel = kernels().gptq;
  const auto* left_rows = static_cast<const char*>(left.const_data_ptr());
  const auto* right_rows = static_cast<const char*>(right.const_data_ptr());
  auto* sums = static_cast<double*>(matrix.mutable_data_ptr());
  const int64_t row_bytes = features * (type == FloatType::kFloat32 ? 4 : 2);
  for_each_block(std::move(blocks), [&](const PanelBlock& block, float* scratch) {
    for (int64_t first = 0; first < tokens; first += kTokenChunk) {
      const HessianInput input = {right_rows + first * row_bytes, type, std::min(kTokenChunk, tokens - first), features,
                                  left_rows + first * row_bytes};
      kernel.hessian_block(input, block, sums, scratch);
    }
  });
}

Tensor hessian_matrix(Tensor tiles, int64_t features) {
  check(features >= 1, "features=", features, " is not positive");
  check_tiles(tiles, features);
  Tensor matrix = new_tensor({features, features}, ScalarType::Double);
  const auto* sums = static_cast<const double*>(tiles.const_data_ptr());
  auto* out = static_cast<double*>(matrix.mutable_data_ptr());
  constexpr int64_t kTile = kPanelWidth * kPanelWidth;
  parallel_for(ceil_div(features, kPanelWidth), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kPanelWidth; row < std::min(end * kPanelWidth, features); ++row) {
      const int64_t i = row / kPanelWidth, r = row % kPanelWidth;
      for (int64_t column = 0; column < features; ++column) {
        const int64_t j = column / kPanelWidth, c = column % kPanelWidth;
        out[row * features + column] = column <= row ? sums[(i * (i + 1) / 2 + j) * kTile + r * kPanelWidth + c]
                                                     : sums[(j * (j + 1) / 2 + i) * kTile + c * kPanelWidth + r];
      }
    }
  });
  return matrix;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_round(Tensor weight, Tensor factor, Tensor order, OptionalTensor scale,
                                                      OptionalTensor zero_point, OptionalTensor importance,
                                                      int64_t bits, bool symmetric, bool narrow_range,
                                                      int64_t group_size, int64_t grid, double max_shrink,
                                                      ScalarType scale_dtype, OptionalTensor codebook) {
  const FloatType type = float_type(weight, "weight"), scale_type = float_type(scale_dtype, "scale");
  check(weight.dim() == 2, "weight has ", weight.dim(), " dimensions, not two");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(bits >= 1 && bits <= 8, "bits=", bits, " is outside 1..8");
  check(!narrow_range || (symmetric && bits > 1), "narrow_range needs a symmetric range of at least 2 bits");
  check(grid >= 1 && grid <= 1 << 20, "grid=", grid, " is not a positive number of candidates");
  check(max_shrink >= 0 && max_shrink < 1, "max_shrink=", max_shrink, " is outside [0, 1)");
  check(columns >= 1 && columns < 1 << 24, "weight has ", columns, " columns");
  check(group_size >= 1 && columns % group_size == 0, "group_size=", group_size, " does not divide ", columns,
        " columns");
  check_type(factor, ScalarType::Float, "factor");
  check(factor.dim() == 2 && factor.size(0) == columns && factor.size(1) == columns, "factor is not [", columns, ", ",
        columns, "]");
  check_type(order, ScalarType::Int, "order");
  check(order.dim() == 1 && order.size(0) == columns, "order does not have ", columns, " elements");
  const bool search = !scale;
  check(search == !zero_point, "scale and zero_point go together");

  const Tensor weights = as_contiguous(weight), factors = as_contiguous(factor), visited = as_contiguous(order);
  const int64_t groups = columns / group_size;
  const auto* columns_in_order = static_cast<const int32_t*>(visited.const_data_ptr());
  std::vector<bool> seen(static_cast<size_t>(columns));
  for (int64_t k = 0; k < columns; ++k) {
    const int32_t column = columns_in_order[k];
    check(column >= 0 && column < columns && !seen[static_cast<size_t>(column)], "order is not a permutation");
    seen[static_cast<size_t>(column)] = true;
    check(!search || column / group_size == columns_in_order[k / group_size * group_size] / group_size,
          "order takes a group apart whose scale is to be searched for");
  }
  Tensor scales = new_tensor({rows, groups}, ScalarType::Float);
  Tensor zero_points = new_tensor({rows, groups}, ScalarType::Int);
  if (!search) {
    check_type(*scale, ScalarType::Float, "scale");
    check_type(*zero_point, ScalarType::Int, "zero_point");
    check(scale->dim() == 2 && scale->size(0) == rows && scale->size(1) == groups && zero_point->dim() == 2 &&
              zero_point->size(0) == rows && zero_point->size(1) == groups,
          "scale and zero_point are not [", rows, ", ", groups, "]");
    scales = as_contiguous(*scale);
    zero_points = as_contiguous(*zero_point);
  }
  Tensor column_weights = weights;  // importance, if there is any
  if (importance) {
    check_type(*importance, ScalarType::Float, "importance");
    check(importance->dim() == 1 && importance->size(0) == columns, "importance does not have ", columns, " elements");
    column_weights = as_contiguous(*importance);
  }
  Tensor codes = new_tensor({rows, columns}, ScalarType::Byte);
  Tensor loss = new_tensor({rows}, ScalarType::Float);

  const Visit visit = plan_visit(columns_in_order, columns, group_size, search);
  const auto slots = static_cast<int64_t>(visit.column_of_slot.size());
  const int64_t panels = slots / kFeedbackColumns;
  const AlignedScratch feedback(feedback_offset(panels) * static_cast<int64_t>(sizeof(float)));
  std::vector<float> pivot(static_cast<size_t>(slots), 0.f);
  std::vector<int64_t> position(static_cast<size_t>(slots), -1);  // of a slot in the visiting order
  int64_t visited_columns = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (visit.column_of_slot[static_cast<size_t>(s)] >= 0) position[static_cast<size_t>(s)] = visited_columns++;
  }
  const auto* matrix = static_cast<const float*>(factors.const_data_ptr());
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t k = position[static_cast<size_t>(s)];
    if (k >= 0) pivot[static_cast<size_t>(s)] = matrix[k * columns + k];
  }
  // Eight panels read a row of the matrix together, whole cache lines of it.
  constexpr int64_t kTogether = 8;
  parallel_for(ceil_div(panels, kTogether), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTogether; first < std::min(end * kTogether, panels); first += kTogether) {
      const int64_t last = std::min(first + kTogether, panels);
      for (int64_t j = 0; j < last * kFeedbackColumns; ++j) {
        const int64_t row = position[static_cast<size_t>(j)];
        for (int64_t panel = std::max(first, j / kFeedbackColumns); panel < last; ++panel) {
          float* out = feedback.floats() + feedback_offset(panel) + j * kFeedbackColumns;
          const int64_t slot = panel * kFeedbackColumns, k = position[static_cast<size_t>(slot)];
          if (row >= 0 && k > row && position[static_cast<size_t>(slot + kFeedbackColumns - 1)] >= 0) {
            const float* in = matrix + row * columns + k;
            for (int64_t c = 0; c < kFeedbackColumns; ++c) out[c] = in[c] / pivot[static_cast<size_t>(slot + c)];
            continue;
          }
          for (int64_t c = 0; c < kFeedbackColumns; ++c) {
            const int64_t column = position[static_cast<size_t>(slot + c)];
            const bool used = row >= 0 && column > row;
            out[c] = used ? matrix[row * columns + column] / pivot[static_cast<size_t>(slot + c)] : 0.f;
          }
        }
      }
    }
  });
  for (float& diagonal : pivot) diagonal *= diagonal;

  const RoundProblem problem = {
      .weight = weights.const_data_ptr(),
      .weight_type = type,
      .rows = rows,
      .columns = columns,
      .column_of_slot = visit.column_of_slot.data(),
      .slots = slots,
      .blocks = visit.blocks.data(),
      .block_count = static_cast<int64_t>(visit.blocks.size()),
      .longest_range = visit.longest_range,
      .feedback = feedback.floats(),
      .pivot = pivot.data(),
      .group_size = group_size,
      .search = search,
      .options = {.bits = static_cast<int>(bits),
                  .symmetric = symmetric,
                  .narrow_range = narrow_range,
                  .steps = static_cast<int>(grid),
                  .shrink_step = static_cast<float>(max_shrink / static_cast<double>(grid)),
                  .scale_type = scale_type,
                  .codebook = codebook ? check_codebook_entries(*codebook) : nullptr,
                  .codebook_entries = codebook ? static_cast<int>(codebook->numel()) : 0},
      .importance = importance ? static_cast<const float*>(column_weights.const_data_ptr()) : nullptr,
      .scale = static_cast<float*>(scales.mutable_data_ptr()),
      .zero_point = static_cast<int32_t*>(zero_points.mutable_data_ptr()),
      .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
      .loss = static_cast<float*>(loss.mutable_data_ptr())};
  const GptqKernels& kernel = kernels().gptq;
  // Few rows are cut finer, so that every thread gets some; it does not change what a row gives.
  const int64_t row_panels = ceil_div(rows, kPanelWidth);
  const int64_t per_task = std::clamp<int64_t>(row_panels / 8, 1, kRoundPanels);
  parallel_for(ceil_div(row_panels, per_task), 1, [&](int64_t begin, int64_t end) {
    const int64_t step = per_task * kPanelWidth;
    const AlignedScratch scratch(kernel.round_scratch(problem, std::min(step, rows)));
    for (int64_t task = begin; task < end; ++task) {
      kernel.round_rows(problem, task * step, std::min((task + 1) * step, rows), scratch.get());
    }
  });
  return {codes, scales, zero_points, loss};
}

}  // namespace halfbyte::ops
