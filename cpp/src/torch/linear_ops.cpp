// linear_weight_only and linear_int8: rows made ready in parallel, then products in parallel over row blocks x panel
// tiles.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kMinTaskNs = 4000;     // less work than this is not worth another thread
constexpr int64_t kCodeBytesPerNs = 20;  // rough speeds of one core, for that decision only
constexpr int64_t kProductsPerNs = 100;
constexpr int64_t kRowElementsPerNs = 8;
constexpr int64_t kKeptBytes = 1 << 20;  // larger buffers are not kept from call to call

// 64-byte aligned memory of one thread, kept from call to call while it is small.
class LocalBuffer {
 public:
  std::byte* get(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      memory_.reset(static_cast<std::byte*>(operator new(static_cast<size_t>(bytes), kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }
  void release_if_large() {
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t size_ = 0;
};

// Parts of one buffer, each 64-byte aligned: sizes first, then pointers.
class Parts {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Checked operands of one linear layer.
struct Linear {
  Tensor x, qweight, scale;
  OptionalTensor zero_point, bias;
  TiledWeight weight;
  FloatType type;  // of x and y
  int64_t rows;
  std::vector<int64_t> y_sizes;

  int64_t in() const { return weight.shape.in_features; }
  int64_t out() const { return weight.shape.out_features; }
};

OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  OptionalTensor result;
  if (tensor) result.emplace(as_contiguous(*tensor));
  return result;
}

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
  check_type(qweight, ScalarType::Byte, "qweight");
  check_matrix(qweight, "qweight", shape.panels(), shape.panel_bytes());
  check_matrix(scale, "scale", shape.groups(), out_features);
  if (zero_point) {
    check_type(*zero_point, ScalarType::Byte, "zero_point");
    check_matrix(*zero_point, "zero_point", shape.groups(), out_features);
  }
  if (bias) check(bias->dim() == 1 && bias->size(0) == out_features, "bias must have shape [", out_features, "]");
  Linear l = {.x = as_contiguous(x),
              .qweight = as_contiguous(qweight),
              .scale = as_contiguous(scale),
              .zero_point = contiguous_or_none(zero_point),
              .bias = contiguous_or_none(bias),
              .weight = {},
              .type = float_type(x, "x"),
              .rows = rows,
              .y_sizes = std::move(y_sizes)};
  l.weight = {.shape = shape,
              .codes = static_cast<const uint8_t*>(l.qweight.const_data_ptr()),
              .scale = l.scale.const_data_ptr(),
              .scale_type = float_type(l.scale, "scale"),
              .zero_point = l.zero_point ? static_cast<const uint8_t*>(l.zero_point->const_data_ptr()) : nullptr};
  return l;
}

// The bias as float32: its own data, or a copy.
class FloatBias {
 public:
  explicit FloatBias(const Linear& l) {
    if (!l.bias) return;
    const FloatType type = float_type(*l.bias, "bias");
    if (type == FloatType::kFloat32) {
      data_ = static_cast<const float*>(l.bias->const_data_ptr());
    } else {
      copy_.resize(static_cast<size_t>(l.out()));
      kernels().elementwise.to_float(l.bias->const_data_ptr(), type, copy_.data(), l.out());
      data_ = copy_.data();
    }
  }
  const float* get() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

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

// multiply(row_begin, row_end, panel_begin, panel_end, scratch) over the whole product, in parallel.
template <class F>
void for_product_tiles(const Linear& l, const F& multiply) {
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const int64_t panels = shape.panels(), tiles = ceil_div(panels, kernel.panels_per_tile);
  // Rows are split only where the panels alone would not keep the threads equally busy.
  const int64_t wanted = 8 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t row_tiles = ceil_div(l.rows, kernel.rows_per_tile);
  const int64_t splits = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(tiles, 1)), 1, row_tiles);
  const int64_t rows_each = ceil_div(row_tiles, splits) * kernel.rows_per_tile;
  const int64_t blocks = ceil_div(l.rows, rows_each);
  const int64_t tile_bytes = kernel.panels_per_tile * shape.panel_bytes();
  const int64_t task_ns = tile_bytes / kCodeBytesPerNs + std::min(rows_each, l.rows) * kernel.panels_per_tile * kPanel *
                                                             shape.padded_in() / kProductsPerNs;
  parallel_for(blocks * tiles, ceil_div(kMinTaskNs, std::max<int64_t>(task_ns, 1)), [&](int64_t task, int64_t end) {
    thread_local LocalBuffer scratch;
    void* memory = scratch.get(kernel.scratch_bytes(shape));
    while (task < end) {
      const int64_t block = task / tiles, tile = task % tiles, count = std::min(tiles - tile, end - task);
      multiply(block * rows_each, std::min((block + 1) * rows_each, l.rows), tile * kernel.panels_per_tile,
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

LocalBuffer& call_buffer() {
  thread_local LocalBuffer buffer;
  return buffer;
}

// One element of a tensor of qparams.
template <class T>
T single(const Tensor& tensor, ScalarType type, const char* name) {
  check_type(tensor, type, name);
  check(tensor.numel() == 1, name, " must have one element, not ", tensor.numel());
  return *static_cast<const T*>(tensor.const_data_ptr());
}

}  // namespace

Tensor linear_weight_only(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias,
                          int64_t bits, int64_t out_features, int64_t group_size, OptionalTensor codebook) {
  Linear l = checked(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  if (codebook) l.weight.codebook = check_codebook_table(*codebook, bits, zero_point);
  Tensor y = new_tensor(x, l.y_sizes, x.scalar_type());
  if (l.rows == 0 || l.out() == 0) return y;
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const FloatBias float_bias(l);

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
    for_product_tiles(l, [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
      kernel.matmul_float(l.weight, rows, sums, row, row_end, panel, panel_end, float_bias.get(), out, l.out(),
                          scratch);
    });
  });
  call_buffer().release_if_large();
  return y;
}

Tensor linear_int8(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias, int64_t bits,
                   int64_t out_features, int64_t group_size, OptionalTensor act_scale, OptionalTensor act_zero_point) {
  const Linear l = checked(x, qweight, scale, zero_point, bias, bits, out_features, group_size);
  check(act_scale.has_value() || !act_zero_point.has_value(), "act_zero_point needs act_scale");
  const float static_scale = act_scale ? single<float>(*act_scale, ScalarType::Float, "act_scale") : 1.0f;
  const int32_t static_zero = act_zero_point ? single<int32_t>(*act_zero_point, ScalarType::Int, "act_zero_point") : 0;
  check(static_scale > 0.0f && std::isfinite(static_scale), "act_scale=", static_scale, " is not positive and finite");
  check(static_zero >= -128 && static_zero <= 127, "act_zero_point=", static_zero, " is not in [-128, 127]");
  Tensor y = new_tensor(x, l.y_sizes, x.scalar_type());
  if (l.rows == 0 || l.out() == 0) return y;
  const MatmulKernels& kernel = kernels().matmul;
  const TileShape& shape = l.weight.shape;
  const FloatBias float_bias(l);

  Parts parts;
  const int64_t codes_at = parts.add<int8_t>(l.rows * code_stride(shape));
  const int64_t scales_at = parts.add<float>(l.rows);
  const int64_t sums_at = parts.add<int32_t>(l.rows * shape.groups() * chunks_per_group(shape));
  const int64_t y_at = parts.add<float>(l.type == FloatType::kFloat32 ? 0 : l.rows * l.out());
  std::byte* memory = call_buffer().get(parts.bytes());
  const QuantizedRows rows = {.codes = reinterpret_cast<int8_t*>(memory + codes_at),
                              .scale = reinterpret_cast<float*>(memory + scales_at),
                              .chunk_sum = reinterpret_cast<int32_t*>(memory + sums_at),
                              .zero_point = static_zero};
  for_float_rows(l, [&](const float* from, int64_t ldx, int64_t begin, int64_t end) {
    if (act_scale) {
      kernel.quantize_rows_static(from, ldx, begin, end, shape, static_scale, rows);
    } else {
      kernel.quantize_rows_dynamic(from, ldx, begin, end, shape, rows);
    }
  });
  with_float_output(l, y, reinterpret_cast<float*>(memory + y_at), [&](float* out) {
    for_product_tiles(l, [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end, void* scratch) {
      kernel.matmul_int8(l.weight, rows, row, row_end, panel, panel_end, float_bias.get(), out, l.out(), scratch);
    });
  });
  call_buffer().release_if_large();
  return y;
}

}  // namespace halfbyte::ops
