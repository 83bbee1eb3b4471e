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
constexpr int64_t kPiece = 1024;     // rows of a bag that are summed at a time; pieces are added in order
constexpr int64_t kAhead = 32;       // rows between the one at hand and the one being prefetched: a bag or so

struct Table {
  TileShape shape;
  bool tiled;
  const uint8_t* codes;
  int64_t row_bytes;  // rows layout
  const std::byte* scale;
  FloatType scale_type;
  const uint8_t* zero_point;
  const float* codebook;

  bool binary() const { return shape.bits == 1 && zero_point == nullptr && codebook == nullptr; }
  int64_t qparam_at(int64_t row, int64_t group) const {
    return tiled ? group * shape.out_features + row : row * shape.groups() + group;
  }
  float scale_at(int64_t at) const {
    if (scale_type == FloatType::kFloat32) return reinterpret_cast<const float*>(scale)[at];
    float value;
    kernels().elementwise.to_float(scale + at * 2, scale_type, &value, 1);
    return value;
  }
  // Codes, scale and zero point of a row that will be read soon. Into the second-level cache: it takes more requests at
  // a time than the first.
  void prefetch(int64_t row) const {
    if (tiled) return;
    const auto request = [](const void* address) { __builtin_prefetch(address, 0, 2); };
    const uint8_t* packed = codes + row * row_bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += 64) request(packed + byte);
    request(packed + row_bytes - 1);
    request(scale + qparam_at(row, 0) * (scale_type == FloatType::kFloat32 ? 4 : 2));
    if (zero_point != nullptr) request(zero_point + qparam_at(row, 0));
  }
};

// Reduces bags one after another with buffers of its own.
class BagReader {
 public:
  BagReader(const Table& table, Mode mode, const int64_t* ids, int64_t count, const float* weights, int64_t padding_row)
      : table_(table), mode_(mode), ids_(ids), count_(count), weights_(weights), padding_row_(padding_row) {
    const TileShape& shape = table.shape;
    const int bits = shape.bits;
    const bool packs_whole = bits == 8 || bits == 4 || bits == 2;
    packed_ = packs_whole && !table.tiled && mode != Mode::kMax && table.codebook == nullptr &&
              (shape.groups() == 1 || shape.group_size % bag_vector(bits) == 0);
    sum_.resize(static_cast<size_t>(shape.in_features));
  }

  // out[embedding_dim] of indices [begin, end).
  void read(int64_t begin, int64_t end, float* out) {
    const int64_t dim = table_.shape.in_features;
    int64_t rows = 0;
    std::fill(out, out + dim, 0.f);
    for (int64_t at = begin; at < end;) {
      const int64_t taken = take(at, end);
      if (taken == 0) continue;
      if (mode_ == Mode::kMax) {
        maximum(out, rows == 0);
      } else {
        float* sum = rows == 0 ? out : sum_.data();
        add_up(sum);
        for (int64_t e = 0; sum != out && e < dim; ++e) out[e] += sum[e];
      }
      rows += taken;
    }
    if (mode_ == Mode::kMean && rows > 0) {
      for (int64_t e = 0; e < dim; ++e) out[e] /= static_cast<float>(rows);
    }
  }

 private:
  // The next rows of a bag with their factors and zero points, padding left out; moves `at` past them.
  int64_t take(int64_t& at, int64_t end) {
    rows_.clear();
    factor_.clear();
    const int64_t groups = table_.shape.groups();
    const bool plain = groups == 1 && !table_.tiled && table_.scale_type == FloatType::kFloat32;
    for (; at < end && static_cast<int64_t>(rows_.size()) < kPiece; ++at) {
      if (at + kAhead < count_) table_.prefetch(ids_[at + kAhead]);
      const int64_t row = ids_[at];
      if (row == padding_row_) continue;
      rows_.push_back(row);
      const float weight = weights_ == nullptr ? 1.f : weights_[at];
      if (plain) {
        factor_.push_back(weight * reinterpret_cast<const float*>(table_.scale)[row]);
      } else {
        for (int64_t g = 0; g < groups; ++g) factor_.push_back(weight * table_.scale_at(table_.qparam_at(row, g)));
      }
    }
    zero_.resize(factor_.size(), table_.binary() ? 1 : 1 << (table_.shape.bits - 1));
    if (table_.zero_point != nullptr) {
      size_t to = 0;
      for (const int64_t row : rows_) {
        for (int64_t g = 0; g < groups; ++g) zero_[to++] = table_.zero_point[table_.qparam_at(row, g)];
      }
    }
    return static_cast<int64_t>(rows_.size());
  }

  void add_up(float* out) {
    const TileShape& shape = table_.shape;
    const auto count = static_cast<int64_t>(rows_.size());
    codes_.resize(rows_.size());
    const auto kernel = kernels().embedding_bag.sum_rows;
    if (packed_) {
      for (size_t r = 0; r < rows_.size(); ++r) codes_[r] = table_.codes + rows_[r] * table_.row_bytes;
      return kernel(
          {codes_.data(), factor_.data(), zero_.data(), count, shape.in_features, shape.group_size, shape.bits}, out);
    }
    unpack();
    const int64_t groups = shape.groups();
    if (table_.codebook != nullptr) {
      std::fill_n(out, shape.in_features, 0.f);
      for (size_t r = 0; r < rows_.size(); ++r) {
        for (int64_t e = 0; e < shape.in_features; ++e) out[e] += value(r, e);
      }
      return;
    }
    if (groups == 1 || shape.group_size % bag_vector(8) == 0) {
      for (size_t r = 0; r < rows_.size(); ++r) codes_[r] = unpacked_row(r);
      return kernel({codes_.data(), factor_.data(), zero_.data(), count, shape.in_features, shape.group_size, 8}, out);
    }
    std::vector<float> factor(rows_.size());
    std::vector<int32_t> zero(rows_.size());
    for (int64_t g = 0; g < groups; ++g) {
      for (size_t r = 0; r < rows_.size(); ++r) {
        const size_t at = r * static_cast<size_t>(groups) + static_cast<size_t>(g);
        codes_[r] = unpacked_row(r) + g * shape.group_size;
        factor[r] = factor_[at];
        zero[r] = zero_[at];
      }
      kernel({codes_.data(), factor.data(), zero.data(), count, shape.group_size, shape.group_size, 8},
             out + g * shape.group_size);
    }
  }

  void maximum(float* out, bool first) {
    const TileShape& shape = table_.shape;
    unpack();
    for (size_t r = 0; r < rows_.size(); ++r) {
      for (int64_t e = 0; e < shape.in_features; ++e) {
        const float x = value(r, e);
        out[e] = (first && r == 0) || x > out[e] ? x : out[e];
      }
    }
  }

  // Element e of unpacked row r times the row's weight.
  float value(size_t r, int64_t e) {
    const TileShape& shape = table_.shape;
    const size_t qparam = r * static_cast<size_t>(shape.groups()) + static_cast<size_t>(e / shape.group_size);
    const uint8_t code = unpacked_row(r)[e];
    return factor_[qparam] *
           (table_.codebook != nullptr ? table_.codebook[code] : static_cast<float>(code - zero_[qparam]));
  }

  // Codes of the rows at hand, one byte each; twice the code of a binary row, whose zero point is 1.
  void unpack() {
    const TileShape& shape = table_.shape;
    unpacked_.resize(rows_.size() * static_cast<size_t>(shape.in_features));
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (table_.tiled) {
        unpack_tile_row(table_.codes, shape, rows_[r], unpacked_row(r));
      } else {
        unpack_rows(table_.codes + rows_[r] * table_.row_bytes, 1, shape.in_features, shape.bits, unpacked_row(r));
      }
    }
    if (table_.binary()) {
      for (uint8_t& code : unpacked_) code = static_cast<uint8_t>(2 * code);
    }
  }
  uint8_t* unpacked_row(size_t r) { return unpacked_.data() + r * static_cast<size_t>(table_.shape.in_features); }

  const Table& table_;
  Mode mode_;
  const int64_t* ids_;
  int64_t count_;
  const float* weights_;
  int64_t padding_row_;
  bool packed_;
  std::vector<int64_t> rows_;
  std::vector<float> factor_, sum_;
  std::vector<int32_t> zero_;
  std::vector<const uint8_t*> codes_;
  std::vector<uint8_t> unpacked_;
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
                       .codes = static_cast<const uint8_t*>(codes.const_data_ptr()),
                       .row_bytes = row_bytes,
                       .scale = static_cast<const std::byte*>(scales.const_data_ptr()),
                       .scale_type = float_type(scales, "scale"),
                       .zero_point = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                       .codebook = codebook ? check_codebook_table(*codebook, bits, zero_point) : nullptr};
  Tensor y = new_tensor(qweight, {bags, embedding_dim}, dtype);
  auto* out = static_cast<std::byte*>(y.mutable_data_ptr());
  const float* weight_data = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  const auto row_size = embedding_dim * (type == FloatType::kFloat32 ? 4 : 2);
  const int64_t elements_per_bag = embedding_dim * std::max<int64_t>(ids.size() / std::max<int64_t>(bags, 1), 1);
  parallel_for(bags, ceil_div(kGrain, elements_per_bag), [&](int64_t begin, int64_t end) {
    BagReader reader(table, static_cast<Mode>(mode_index), ids.data(), ids.size(), weight_data,
                     padding_idx.value_or(-1));
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
