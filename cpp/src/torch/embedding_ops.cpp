// embedding_weight_only: rows of a packed table, unpacked and dequantized as they are gathered. Every index is checked
// before anything is read.
#include <algorithm>
#include <vector>

#include "halfbyte/dispatch.h"
#include "halfbyte/packing.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread takes at least

// A table of codes in either layout, with its qparams.
struct Table {
  TileShape shape;
  bool tiled;
  const uint8_t* codes;
  const void* scale;  // [num_embeddings, groups], transposed when tiled
  FloatType scale_type;
  const uint8_t* zero_point;
  const float* codebook;

  int64_t rows() const { return shape.out_features; }
  int64_t groups() const { return shape.groups(); }
  int64_t qparam_at(int64_t row, int64_t group) const { return tiled ? group * rows() + row : row * groups() + group; }
};

// Reads rows one after another into buffers of its own.
class RowReader {
 public:
  explicit RowReader(const Table& table)
      : table_(table),
        codes_(static_cast<size_t>(table.shape.in_features)),
        row_(static_cast<size_t>(table.shape.in_features)) {}

  void read(int64_t row, std::byte* out, FloatType type) {
    const TileShape& shape = table_.shape;
    if (table_.tiled) {
      unpack_tile_row(table_.codes, shape, row, codes_.data());
    } else {
      unpack_rows(table_.codes + row * packed_row_bytes(shape.in_features, shape.bits), 1, shape.in_features,
                  shape.bits, codes_.data());
    }
    const bool binary = shape.bits == 1 && table_.zero_point == nullptr;
    const int times = binary ? 2 : 1;
    for (int64_t g = 0; g < table_.groups(); ++g) {
      const int64_t at = table_.qparam_at(row, g);
      const float scale = scale_at(at);
      const int zero = binary ? 1 : table_.zero_point != nullptr ? table_.zero_point[at] : 1 << (shape.bits - 1);
      const int64_t begin = g * shape.group_size, end = std::min(begin + shape.group_size, shape.in_features);
      for (int64_t k = begin; k < end; ++k) {
        const auto i = static_cast<size_t>(k);
        const float value =
            table_.codebook != nullptr ? table_.codebook[codes_[i]] : static_cast<float>(times * codes_[i] - zero);
        row_[i] = value * scale;
      }
    }
    kernels().elementwise.from_float(row_.data(), type, out, shape.in_features);
  }

 private:
  float scale_at(int64_t at) const {
    const size_t bytes = table_.scale_type == FloatType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
    float scale;
    kernels().elementwise.to_float(static_cast<const std::byte*>(table_.scale) + static_cast<size_t>(at) * bytes,
                                   table_.scale_type, &scale, 1);
    return scale;
  }

  const Table& table_;
  std::vector<uint8_t> codes_;
  std::vector<float> row_;
};

template <class Index>
void check_indices(const Index* indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    check(indices[i] >= 0 && indices[i] < rows, "index ", indices[i], " is outside a table of num_embeddings=", rows);
  }
}

}  // namespace

Tensor embedding_weight_only(Tensor indices, Tensor qweight, Tensor scale, OptionalTensor zero_point, int64_t bits,
                             int64_t num_embeddings, int64_t embedding_dim, int64_t group_size, bool tiled,
                             ScalarType dtype, OptionalTensor codebook) {
  check(bits >= 1 && bits <= 8, "bits=", bits, " is not in 1..8");
  check(num_embeddings >= 0 && embedding_dim >= 0 && group_size >= 1, "num_embeddings=", num_embeddings,
        ", embedding_dim=", embedding_dim, " or group_size=", group_size, " is out of range");
  check(embedding_dim % group_size == 0, "group_size=", group_size, " does not divide embedding_dim=", embedding_dim);
  const FloatType type = float_type(dtype, "dtype");
  const TileShape shape = {.out_features = num_embeddings,
                           .in_features = embedding_dim,
                           .group_size = group_size,
                           .bits = static_cast<int>(bits)};
  check_type(qweight, ScalarType::Byte, "qweight");
  if (tiled) {
    check_matrix(qweight, "qweight", shape.panels(), shape.panel_bytes());
  } else {
    check_matrix(qweight, "qweight", num_embeddings, packed_row_bytes(embedding_dim, shape.bits));
  }
  const int64_t first = tiled ? shape.groups() : num_embeddings, second = tiled ? num_embeddings : shape.groups();
  check_matrix(scale, "scale", first, second);
  if (zero_point) {
    check_type(*zero_point, ScalarType::Byte, "zero_point");
    check_matrix(*zero_point, "zero_point", first, second);
  }
  const bool wide = indices.scalar_type() == ScalarType::Long;
  check(wide || indices.scalar_type() == ScalarType::Int, "indices have dtype ",
        torch::headeronly::toString(indices.scalar_type()), "; use int32 or int64");

  const Tensor ids = as_contiguous(indices), codes = as_contiguous(qweight), scales = as_contiguous(scale);
  OptionalTensor zeros;
  if (zero_point) zeros.emplace(as_contiguous(*zero_point));
  const int64_t count = ids.numel();
  const auto* ids64 = static_cast<const int64_t*>(wide ? ids.const_data_ptr() : nullptr);
  const auto* ids32 = static_cast<const int32_t*>(wide ? nullptr : ids.const_data_ptr());
  if (wide) {
    check_indices(ids64, count, num_embeddings);
  } else {
    check_indices(ids32, count, num_embeddings);
  }
  const auto sizes = indices.sizes();
  std::vector<int64_t> y_sizes(sizes.begin(), sizes.end());
  y_sizes.push_back(embedding_dim);
  Tensor y = new_tensor(y_sizes, dtype);
  if (embedding_dim == 0) return y;

  const Table table = {.shape = shape,
                       .tiled = tiled,
                       .codes = static_cast<const uint8_t*>(codes.const_data_ptr()),
                       .scale = scales.const_data_ptr(),
                       .scale_type = float_type(scales, "scale"),
                       .zero_point = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                       .codebook = codebook ? check_codebook_table(*codebook, bits, zero_point) : nullptr};
  auto* out = static_cast<std::byte*>(y.mutable_data_ptr());
  const auto row_bytes = static_cast<size_t>(embedding_dim) * (type == FloatType::kFloat32 ? 4 : 2);
  parallel_for(count, ceil_div(kGrain, embedding_dim), [&](int64_t begin, int64_t end) {
    RowReader reader(table);
    for (int64_t i = begin; i < end; ++i) {
      reader.read(wide ? ids64[i] : ids32[i], out + static_cast<size_t>(i) * row_bytes, type);
    }
  });
  return y;
}

}  // namespace halfbyte::ops
