// embedding_bag_weight_only: sums, means and maxima of rows of a packed table. Every index and offset is checked before
// anything is read.
//
// Rows of 8, 4 or 2 bits in the rows layout are summed as they are packed. Other widths, tables in the tiles layout,
// groups that do not fill vectors, codebooks and maxima go through codes unpacked to bytes, some rows at a time.
#include <algorithm>
#include <limits>
#include <vector>

#include "halfbyte/dispatch.h"
#include "halfbyte/packing.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

enum class Mode : int64_t { kSum = 0, kMean = 1, kMax = 2 };

constexpr int64_t kGrain = 1 << 13;  // elements read that a thread takes at least
constexpr int64_t kPiece = 1024;     // rows of a bag that are unpacked at a time

struct Table {
  TileShape shape;
  bool tiled;
  BagTable packed;  // as it is in memory; `codes` and qparams are read with the tiles layout in mind if `tiled`
  const float* codebook;

  int64_t qparam_at(int64_t row, int64_t group) const {
    return tiled ? group * shape.out_features + row : row * shape.groups() + group;
  }
  float scale_at(int64_t at) const {
    float value;
    const auto* scale = static_cast<const std::byte*>(packed.scale);
    const auto bytes = packed.scale_type == FloatType::kFloat32 ? 4 : 2;
    kernels().elementwise.to_float(scale + at * bytes, packed.scale_type, &value, 1);
    return value;
  }
  bool binary() const { return shape.bits == 1 && packed.zero_point == nullptr && codebook == nullptr; }
};

// Reduces bags one after another with buffers of its own.
class BagReader {
 public:
  // `bags` describes all of them at once.
  BagReader(const Table& table, Mode mode, const Bag& bags) : table_(table), mode_(mode), bags_(bags) {
    const TileShape& shape = table.shape;
    const int bits = shape.bits;
    const bool packs_whole = bits == 8 || bits == 4 || bits == 2;
    packed_ = packs_whole && !table.tiled && mode != Mode::kMax && table.codebook == nullptr &&
              (shape.groups() == 1 || shape.group_size % bag_vector(bits) == 0);
  }

  // out[embedding_dim] of indices [begin, end).
  void read(int64_t begin, int64_t end, float* out) {
    const int64_t dim = table_.shape.in_features;
    int64_t rows = 0;
    if (packed_) {
      rows = end - begin - std::count(bags_.ids + begin, bags_.ids + end, bags_.padding_row);
      kernels().embedding_bag.sum_rows(table_.packed,
                                       {.ids = bags_.ids + begin,
                                        .count = end - begin,
                                        .readable = bags_.count - begin,
                                        .weights = bags_.weights == nullptr ? nullptr : bags_.weights + begin,
                                        .padding_row = bags_.padding_row,
                                        .add = false},
                                       out);
    } else {
      std::fill(out, out + dim, 0.f);
      for (int64_t at = begin; at < end;) {
        const int64_t taken = unpack(at, end);
        if (mode_ == Mode::kMax) {
          maximum(out, taken, rows == 0);
        } else {
          add_up(out, taken);
        }
        rows += taken;
      }
    }
    if (mode_ == Mode::kMean && rows > 0) {
      for (int64_t e = 0; e < dim; ++e) out[e] /= static_cast<float>(rows);
    }
  }

 private:
  // Codes of the next rows of a bag, one byte each, with their factors and zero points, padding left out; moves `at`
  // past them and returns how many there are. Binary rows give twice the code, with a zero point of 1.
  int64_t unpack(int64_t& at, int64_t end) {
    const TileShape& shape = table_.shape;
    const auto dim = static_cast<size_t>(shape.in_features);
    int64_t rows = 0;
    codes_.clear(), factor_.clear(), zero_.clear();
    for (; at < end && rows < kPiece; ++at) {
      const int64_t row = bags_.ids[at];
      if (row == bags_.padding_row) continue;
      codes_.resize(codes_.size() + dim);
      uint8_t* to = codes_.data() + codes_.size() - dim;
      if (table_.tiled) {
        unpack_tile_row(table_.packed.codes, shape, row, to);
      } else {
        unpack_rows(table_.packed.codes + row * table_.packed.row_bytes, 1, shape.in_features, shape.bits, to);
      }
      for (int64_t g = 0; g < shape.groups(); ++g) {
        const int64_t qparam = table_.qparam_at(row, g);
        factor_.push_back((bags_.weights == nullptr ? 1.f : bags_.weights[at]) * table_.scale_at(qparam));
        if (table_.packed.zero_point != nullptr) zero_.push_back(table_.packed.zero_point[qparam]);
      }
      ++rows;
    }
    if (table_.binary()) {
      for (uint8_t& code : codes_) code = static_cast<uint8_t>(2 * code);
    }
    return rows;
  }

  void add_up(float* out, int64_t rows) {
    const TileShape& shape = table_.shape;
    if (table_.codebook != nullptr) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t e = 0; e < shape.in_features; ++e) out[e] += value(r, e);
      }
      return;
    }
    for (int64_t row = static_cast<int64_t>(row_numbers_.size()); row < rows; ++row) row_numbers_.push_back(row);
    BagTable table = {.codes = codes_.data(),
                      .row_bytes = shape.in_features,
                      .scale = factor_.data(),
                      .scale_type = FloatType::kFloat32,
                      .zero_point = zero_.empty() ? nullptr : zero_.data(),
                      .zero = table_.packed.zero,
                      .dim = shape.in_features,
                      .group_size = shape.group_size,
                      .bits = 8};
    const Bag bag = {row_numbers_.data(), rows, 0, nullptr, -1, true};
    if (shape.groups() == 1 || shape.group_size % bag_vector(8) == 0) {
      return kernels().embedding_bag.sum_rows(table, bag, out);
    }
    // Groups that do not fill vectors are tables of their own.
    std::vector<float> factor(static_cast<size_t>(rows));
    std::vector<uint8_t> zero(zero_.empty() ? 0 : factor.size());
    table.dim = shape.group_size;
    table.scale = factor.data();
    if (!zero.empty()) table.zero_point = zero.data();
    for (int64_t g = 0; g < shape.groups(); ++g) {
      for (size_t r = 0; r < factor.size(); ++r) {
        const size_t at = r * static_cast<size_t>(shape.groups()) + static_cast<size_t>(g);
        factor[r] = factor_[at];
        if (!zero.empty()) zero[r] = zero_[at];
      }
      table.codes = codes_.data() + g * shape.group_size;
      kernels().embedding_bag.sum_rows(table, bag, out + g * shape.group_size);
    }
  }

  void maximum(float* out, int64_t rows, bool first) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t e = 0; e < table_.shape.in_features; ++e) {
        const float x = value(r, e);
        out[e] = (first && r == 0) || x > out[e] ? x : out[e];
      }
    }
  }

  // Element e of unpacked row r times the row's weight.
  float value(int64_t r, int64_t e) const {
    const TileShape& shape = table_.shape;
    const auto qparam = static_cast<size_t>(r * shape.groups() + e / shape.group_size);
    const uint8_t code = codes_[static_cast<size_t>(r * shape.in_features + e)];
    if (table_.codebook != nullptr) return factor_[qparam] * table_.codebook[code];
    return factor_[qparam] * static_cast<float>(code - (zero_.empty() ? table_.packed.zero : zero_[qparam]));
  }

  const Table& table_;
  Mode mode_;
  Bag bags_;
  bool packed_;
  std::vector<uint8_t> codes_, zero_;
  std::vector<float> factor_;
  std::vector<int64_t> row_numbers_;
};

// The values of an int32 or int64 tensor.
class Integers {
 public:
  Integers(const Tensor& tensor, const char* name) : tensor_(as_contiguous(tensor)) {
    check(tensor.dim() == 1, name, " must have one dimension");
    if (tensor.scalar_type() == ScalarType::Long) {
      data_ = static_cast<const int64_t*>(tensor_.const_data_ptr());
      return;
    }
    check_type(tensor, ScalarType::Int, name);
    const auto* narrow = static_cast<const int32_t*>(tensor_.const_data_ptr());
    copy_.assign(narrow, narrow + tensor_.numel());
    data_ = copy_.data();
  }
  const int64_t* data() const { return data_; }
  int64_t size() const { return tensor_.numel(); }

 private:
  Tensor tensor_;
  std::vector<int64_t> copy_;
  const int64_t* data_;
};

}  // namespace

Tensor embedding_bag_weight_only(Tensor indices, Tensor offsets, OptionalTensor per_sample_weights, Tensor qweight,
                                 Tensor scale, OptionalTensor zero_point, int64_t bits, int64_t num_embeddings,
                                 int64_t embedding_dim, int64_t group_size, bool tiled, int64_t mode_index,
                                 bool include_last_offset, OptionalInt padding_idx, ScalarType dtype,
                                 OptionalTensor codebook) {
  check(bits >= 1 && bits <= 8, "bits=", bits, " is not in 1..8");
  check(num_embeddings >= 0 && embedding_dim >= 1 && group_size >= 1, "num_embeddings=", num_embeddings,
        ", embedding_dim=", embedding_dim, " or group_size=", group_size, " is out of range");
  check(embedding_dim % group_size == 0, "group_size=", group_size, " does not divide embedding_dim=", embedding_dim);
  check(mode_index >= 0 && mode_index <= 2, "mode=", mode_index, " is not in 0..2");
  const FloatType type = float_type(dtype, "dtype");
  const TileShape shape = {num_embeddings, embedding_dim, group_size, static_cast<int>(bits)};
  const int64_t row_bytes = packed_row_bytes(embedding_dim, shape.bits);
  check_type(qweight, ScalarType::Byte, "qweight");
  check_matrix(qweight, "qweight", tiled ? shape.panels() : num_embeddings, tiled ? shape.panel_bytes() : row_bytes);
  const int64_t first = tiled ? shape.groups() : num_embeddings, second = tiled ? num_embeddings : shape.groups();
  check_matrix(scale, "scale", first, second);
  if (zero_point) {
    check_type(*zero_point, ScalarType::Byte, "zero_point");
    check_matrix(*zero_point, "zero_point", first, second);
  }

  const Integers ids(indices, "indices"), starts(offsets, "offsets");
  const auto outside = [&](int64_t id) { return static_cast<uint64_t>(id) >= static_cast<uint64_t>(num_embeddings); };
  const int64_t* const bad = std::find_if(ids.data(), ids.data() + ids.size(), outside);
  if (bad != ids.data() + ids.size()) {
    check(false, "index ", *bad, " is outside a table of num_embeddings=", num_embeddings);
  }
  const int64_t bags = starts.size() - (include_last_offset ? 1 : 0);
  check(bags >= 0, "offsets are empty; with include_last_offset they hold at least one");
  check(starts.size() == 0 || starts.data()[0] == 0, "offsets[0] is not 0");
  for (int64_t b = 0; b < starts.size(); ++b) {
    const int64_t before = b == 0 ? 0 : starts.data()[b - 1];
    check(starts.data()[b] >= before && starts.data()[b] <= ids.size(), "offsets[", b, "]=", starts.data()[b],
          " is not in ", before, "..", ids.size(), "; offsets do not fall and end with the indices");
  }
  // PyTorch asks for this, and without it reads the indices past the last offset in one mode and not in another.
  check(!include_last_offset || starts.data()[bags] == ids.size(), "offsets end with ", starts.data()[bags],
        "; with include_last_offset they end with the number of indices, ", ids.size());
  OptionalTensor weights;
  if (per_sample_weights) {
    check(mode_index == 0, "per_sample_weights need mode sum");
    check_type(*per_sample_weights, ScalarType::Float, "per_sample_weights");
    check(per_sample_weights->dim() == 1 && per_sample_weights->size(0) == ids.size(),
          "per_sample_weights must have one value for each index");
    weights.emplace(as_contiguous(*per_sample_weights));
  }

  const Tensor codes = as_contiguous(qweight), scales = as_contiguous(scale);
  OptionalTensor zeros;
  if (zero_point) zeros.emplace(as_contiguous(*zero_point));
  const Table table = {.shape = shape,
                       .tiled = tiled,
                       .packed = {.codes = static_cast<const uint8_t*>(codes.const_data_ptr()),
                                  .row_bytes = row_bytes,
                                  .scale = scales.const_data_ptr(),
                                  .scale_type = float_type(scales, "scale"),
                                  .zero_point = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                                  .zero = 1 << (bits - 1),
                                  .dim = embedding_dim,
                                  .group_size = group_size,
                                  .bits = shape.bits},
                       .codebook = codebook ? check_codebook_table(*codebook, bits, zero_point) : nullptr};
  Tensor y = new_tensor({bags, embedding_dim}, dtype);
  auto* out = static_cast<std::byte*>(y.mutable_data_ptr());
  const float* weight_data = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  const auto row_size = embedding_dim * (type == FloatType::kFloat32 ? 4 : 2);
  const int64_t elements_per_bag = embedding_dim * std::max<int64_t>(ids.size() / std::max<int64_t>(bags, 1), 1);
  const Bag all = {.ids = ids.data(),
                   .count = ids.size(),
                   .readable = ids.size(),
                   .weights = weight_data,
                   .padding_row = padding_idx.value_or(-1),
                   .add = false};
  parallel_for(bags, ceil_div(kGrain, elements_per_bag), [&](int64_t begin, int64_t end) {
    BagReader reader(table, static_cast<Mode>(mode_index), all);
    std::vector<float> row(type == FloatType::kFloat32 ? 0 : static_cast<size_t>(embedding_dim));
    for (int64_t bag = begin; bag < end; ++bag) {
      const int64_t last = bag + 1 < starts.size() ? starts.data()[bag + 1] : ids.size();
      std::byte* to = out + bag * row_size;
      if (type == FloatType::kFloat32) {
        reader.read(starts.data()[bag], last, reinterpret_cast<float*>(to));
      } else {
        reader.read(starts.data()[bag], last, row.data());
        kernels().elementwise.from_float(row.data(), type, to, embedding_dim);
      }
    }
  });
  return y;
}

}  // namespace halfbyte::ops
