// linear_weight_only and linear_int8: rows made ready in parallel, then products in parallel over row blocks x panel
// tiles.
#include <algorithm>
#include <vector>

#include "asymmetric_rows.h"
#include "local_buffer.h"
#include "product_operands.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kMinTaskNs = 4000;     // less work than this is not worth another thread
constexpr int64_t kCodeBytesPerNs = 20;  // rough speeds of one core, for that decision only
constexpr int64_t kProductsPerNs = 100;
constexpr int64_t kRowElementsPerNs = 8;

// Checked operands of one linear layer.
struct Linear {
  Tensor x;
  WeightOperand operand;
  TiledWeight weight;
  FloatType type;  // of x and y
  int64_t rows;
  std::vector<int64_t> y_sizes;

  int64_t in() const { return weight.shape.in_features; }
  int64_t out() const { return weight.shape.out_features; }
};

Linear checked(const Tensor& x, const Tensor& qweight, const Tensor& scale, const OptionalTensor& zero_point,
               const OptionalTensor& bias, int64_t bits, int64_t out_features, int64_t group_size) {
  check(x.dim() >= 1, "x must have at least one dimension, [..., in_features]");
  check(bits >= 1 && bits <= 8, "bits=", bits, " is not in 1..8");
  check(out_features >= 0 && group_size >= 1, "out_features=", out_features, " or group_size=", group_size,
        " is out of range");
  const auto sizes = x.sizes();
  std::vector<int64_t> y_sizes(sizes.begin(), sizes.end());
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < y_sizes.size(); ++d) rows *= y_sizes[d];
  const TileShape shape = {.out_features = out_features,
                           .in_features = y_sizes.back(),
                           .group_size = group_size,
                           .bits = static_cast<int>(bits)};
  y_sizes.back() = out_features;
  // Otherwise an x that is a few inputs short would pass for the right one: padding hides the difference.
  check(shape.in_features % group_size == 0, "group_size=", group_size, " does not divide the last size ",
        shape.in_features, " of x");
  Linear l = {.x = as_contiguous(x),
              .operand = checked_weight(shape, qweight, scale, zero_point, bias),
              .weight = {},
              .type = float_type(x, "x"),
              .rows = rows,
              .y_sizes = std::move(y_sizes)};
  l.weight = l.operand.weight;
  return l;
}

// f(float32 rows with stride ldx, begin, end) over all rows, in parallel; half types are converted some rows at a time.
template <class F>
void for_float_rows(const Linear& l, const F& f) {
  const int64_t in = l.in(), grain = kMinTaskNs * kRowElementsPerNs / std::max<int64_t>(in, 1);
  const void* x = l.x.const_data_ptr();
  if (l.type == FloatType::kFloat32) {
    return parallel_for(l.rows, grain,
                        [&](int64_t begin, int64_t end) { f(static_cast<const float*>(x), in, begin, end); });
  }
  parallel_for(l.rows, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> row;
    row.resize(static_cast<size_t>(in));
    for (int64_t r = begin; r < end; ++r) {
      kernels().elementwise.to_float(static_cast<const uint16_t*>(x) + r * in, l.type, row.data(), in);
      f(row.data(), 0, r, r + 1);  // stride 0: row r is the converted one
    }
  });
}

// multiply(row_begin, row_end, panel_begin, panel_end, scratch) over the whole product of `rows` rows, in parallel.
template <class F>
void for_product_tiles(const Linear& l, int64_t rows, const F& multiply) {
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const int64_t panels = shape.panels(), tiles = ceil_div(panels, kernel.panels_per_tile);
  // Rows are split only where the panels alone would not keep the threads equally busy.
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t row_tiles = ceil_div(rows, kernel.rows_per_tile);
  const int64_t splits = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(tiles, 1)), 1, row_tiles);
  const int64_t rows_each = ceil_div(row_tiles, splits) * kernel.rows_per_tile;
  const int64_t blocks = ceil_div(rows, rows_each);
  const int64_t tile_bytes = kernel.panels_per_tile * shape.panel_bytes();
  const int64_t task_ns = tile_bytes / kCodeBytesPerNs + std::min(rows_each, rows) * kernel.panels_per_tile * kPanel *
                                                             shape.padded_in() / kProductsPerNs;
  parallel_for(blocks * tiles, ceil_div(kMinTaskNs, std::max<int64_t>(task_ns, 1)), [&](int64_t task, int64_t end) {
    thread_local LocalBuffer scratch;
    void* memory = scratch.get(kernel.scratch_bytes(shape));
    while (task < end) {
      const int64_t block = task / tiles, tile = task % tiles, count = std::min(tiles - tile, end - task);
      multiply(block * rows_each, std::min((block + 1) * rows_each, rows), tile * kernel.panels_per_tile,
               std::min((tile + count) * kernel.panels_per_tile, panels), memory);
      task += count;
    }
    scratch.release_if_large();
  });
}

// Runs `products(float32 y)` and gives y in x's dtype. `memory` follows what the caller took of the thread's buffer.
template <class F>
void with_float_output(const Linear& l, const Tensor& y, float* memory, const F& products) {
  if (l.type == FloatType::kFloat32) return products(static_cast<float*>(y.mutable_data_ptr()));
  products(memory);
  auto* half = static_cast<uint16_t*>(y.mutable_data_ptr());
  parallel_for(l.rows * l.out(), kMinTaskNs * kRowElementsPerNs, [&](int64_t begin, int64_t end) {
    kernels().elementwise.from_float(memory + begin, l.type, half + begin, end - begin);
  });
}

// A zero point for each row: see asymmetric_rows.h. The row of ones comes last.
Tensor linear_int8_asymmetric(const Tensor& x, const Tensor& qweight, const Tensor& scale,
                              const OptionalTensor& zero_point, const OptionalTensor& bias, int64_t bits,
                              int64_t out_features, int64_t group_size) {
  const Linear l = checked(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  Tensor y = new_tensor(l.y_sizes, x.scalar_type());
  if (l.rows == 0 || l.out() == 0) return y;
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const FloatBias float_bias(l.operand.bias);
  const int64_t rows = l.rows + 1, out = l.out();

  Parts parts;
  const int64_t codes_at = parts.add<int8_t>(rows * code_stride(shape));
  const int64_t scales_at = parts.add<float>(rows);
  const int64_t sums_at = parts.add<int32_t>(rows * shape.groups() * chunks_per_group(shape));
  const int64_t qparams_at = parts.add<RowQparams>(l.rows);
  const int64_t acc_at = parts.add<float>(rows * out);
  const int64_t y_at = parts.add<float>(l.type == FloatType::kFloat32 ? 0 : l.rows * out);
  std::byte* memory = call_buffer().get(parts.bytes());
  const QuantizedRows quantized = {.codes = reinterpret_cast<int8_t*>(memory + codes_at),
                                   .scale = reinterpret_cast<float*>(memory + scales_at),
                                   .chunk_sum = reinterpret_cast<int32_t*>(memory + sums_at),
                                   .zero_point = 0};
  auto* qparams = reinterpret_cast<RowQparams*>(memory + qparams_at);
  auto* acc = reinterpret_cast<float*>(memory + acc_at);
  for_float_rows(l, [&](const float* from, int64_t ldx, int64_t begin, int64_t end) {
    quantize_rows_asymmetric(from, ldx, begin, end, shape, quantized, qparams);
  });
  quantize_ones(l.rows, shape, quantized);
  for_product_tiles(l, rows, [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
    kernel.matmul_int8(l.weight, quantized, row, row_end, panel, panel_end, nullptr, acc, out, scratch);
  });
  with_float_output(l, y, reinterpret_cast<float*>(memory + y_at), [&](float* to) {
    parallel_for(l.rows, kMinTaskNs * kRowElementsPerNs / out, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        finish_row(acc + row * out, acc + l.rows * out, qparams[row], float_bias.get(), to + row * out, 0, out);
      }
    });
  });
  call_buffer().release_if_large();
  return y;
}

}  // namespace

Tensor linear_weight_only(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias,
                          int64_t bits, int64_t out_features, int64_t group_size, OptionalTensor codebook) {
  Linear l = checked(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  if (codebook) l.weight.codebook = check_codebook_table(*codebook, bits, zero_point);
  Tensor y = new_tensor(l.y_sizes, x.scalar_type());
  if (l.rows == 0 || l.out() == 0) return y;
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const FloatBias float_bias(l.operand.bias);

  Parts parts;
  const int64_t rows_at = parts.add<float>(l.rows * float_stride(shape));
  const int64_t sums_at = parts.add<float>(l.rows * shape.groups());
  const int64_t y_at = parts.add<float>(l.type == FloatType::kFloat32 ? 0 : l.rows * l.out());
  std::byte* memory = call_buffer().get(parts.bytes());
  auto* rows = reinterpret_cast<float*>(memory + rows_at);
  auto* sums = reinterpret_cast<float*>(memory + sums_at);
  for_float_rows(l, [&](const float* from, int64_t ldx, int64_t begin, int64_t end) {
    kernel.pad_rows(from, ldx, begin, end, shape, rows, sums);
  });
  with_float_output(l, y, reinterpret_cast<float*>(memory + y_at), [&](float* out) {
    for_product_tiles(l, l.rows, [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
      kernel.matmul_float(l.weight, rows, sums, row, row_end, panel, panel_end, float_bias.get(), out, l.out(),
                          scratch);
    });
  });
  call_buffer().release_if_large();
  return y;
}

Tensor linear_int8(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias, int64_t bits,
                   int64_t out_features, int64_t group_size, OptionalTensor act_scale, OptionalTensor act_zero_point,
                   bool asymmetric) {
  check(!asymmetric || !act_scale, "asymmetric is for scales that are found at run time; act_zero_point says it else");
  if (asymmetric) return linear_int8_asymmetric(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  const Linear l = checked(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  const TensorQparams act = tensor_qparams(act_scale, act_zero_point, "act_scale", "act_zero_point");
  Tensor y = new_tensor(l.y_sizes, x.scalar_type());
  if (l.rows == 0 || l.out() == 0) return y;
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const FloatBias float_bias(l.operand.bias);

  Parts parts;
  const int64_t codes_at = parts.add<int8_t>(l.rows * code_stride(shape));
  const int64_t scales_at = parts.add<float>(l.rows);
  const int64_t sums_at = parts.add<int32_t>(l.rows * shape.groups() * chunks_per_group(shape));
  const int64_t y_at = parts.add<float>(l.type == FloatType::kFloat32 ? 0 : l.rows * l.out());
  std::byte* memory = call_buffer().get(parts.bytes());
  const QuantizedRows rows = {.codes = reinterpret_cast<int8_t*>(memory + codes_at),
                              .scale = reinterpret_cast<float*>(memory + scales_at),
                              .chunk_sum = reinterpret_cast<int32_t*>(memory + sums_at),
                              .zero_point = act.zero_point};
  for_float_rows(l, [&](const float* from, int64_t ldx, int64_t begin, int64_t end) {
    if (act_scale) {
      kernel.quantize_rows_static(from, ldx, begin, end, shape, act.scale, rows);
    } else {
      kernel.quantize_rows_dynamic(from, ldx, begin, end, shape, rows);
    }
  });
  with_float_output(l, y, reinterpret_cast<float*>(memory + y_at), [&](float* out) {
    for_product_tiles(l, l.rows, [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
      kernel.matmul_int8(l.weight, rows, row, row_end, panel, panel_end, float_bias.get(), out, l.out(), scratch);
    });
  });
  call_buffer().release_if_large();
  return y;
}

}  // namespace halfbyte::ops
