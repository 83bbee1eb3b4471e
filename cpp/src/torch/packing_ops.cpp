// pack, unpack, pack_tiles, unpack_tiles: signed codes are shifted to unsigned ones a panel or some rows at a time.
#include <algorithm>
#include <atomic>
#include <vector>

#include "halfbyte/packing.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kGrain = 1 << 16;  // codes a thread takes at least

void check_bits(int64_t bits) { check(bits >= 1 && bits <= 8, "bits=", bits, " is outside 1..8"); }

// What a code is shifted by to become unsigned.
unsigned offset_of(const Tensor& codes, int64_t bits) {
  const ScalarType type = codes.scalar_type();
  check(type == ScalarType::Char || type == ScalarType::Byte, "codes have dtype ", torch::headeronly::toString(type),
        "; use int8 (signed) or uint8 (unsigned)");
  return type == ScalarType::Char ? 1u << (bits - 1) : 0u;
}

// u = q + offset; says whether every u is below 2^bits. Bytes wrap, so that a negative u shows as a large one.
bool to_unsigned(const uint8_t* codes, int64_t count, unsigned offset, int64_t bits, uint8_t* out) {
  unsigned excess = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<uint8_t>(codes[i] + offset);
    excess |= static_cast<unsigned>(out[i]) >> bits;
  }
  return excess == 0;
}

void to_signed(uint8_t* codes, int64_t count, unsigned offset) {
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(codes[i] - offset);
}

void check_fit(bool fit, int64_t bits) { check(fit, "codes hold values that do not fit in bits=", bits); }

int64_t product(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t count = 1;
  for (size_t i = 0; i < sizes.size(); ++i) count *= sizes[i];
  return count;
}

// `tensor`'s sizes with another last one.
std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  const auto sizes = tensor.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

TileShape tile_shape(int64_t out_features, int64_t in_features, int64_t group_size, int64_t bits) {
  check_bits(bits);
  check(out_features >= 0 && in_features >= 0, "the shape (", out_features, ", ", in_features, ") has a negative size");
  check(group_size >= 1, "group_size=", group_size, " is not positive");
  return {.out_features = out_features,
          .in_features = in_features,
          .group_size = group_size,
          .bits = static_cast<int>(bits)};
}

// The rows of one panel as a weight of their own.
TileShape one_panel(const TileShape& shape, int64_t panel) {
  TileShape part = shape;
  part.out_features = std::min(kPanel, shape.out_features - panel * kPanel);
  return part;
}

}  // namespace

void advise_huge_pages_(Tensor x) {
  check(x.is_contiguous(), "x must be contiguous");
  advise_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
}

Tensor pack(Tensor codes, int64_t bits) {
  check_bits(bits);
  check(codes.dim() >= 1, "codes need at least one dimension");
  const unsigned offset = offset_of(codes, bits);
  const Tensor input = as_contiguous(codes);
  const int64_t length = input.size(input.dim() - 1);
  const int64_t rows = length == 0 ? 0 : input.numel() / length;
  const int64_t row_bytes = packed_row_bytes(length, static_cast<int>(bits));
  Tensor packed = new_tensor(with_last(input, row_bytes), ScalarType::Byte);
  const auto* in = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> fit{true};
  parallel_for(rows, kGrain / std::max<int64_t>(length, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(static_cast<size_t>(length));
    for (int64_t r = begin; r < end; ++r) {
      if (!to_unsigned(in + r * length, length, offset, bits, row.data())) fit = false;
      pack_rows(row.data(), 1, length, static_cast<int>(bits), out + r * row_bytes);
    }
  });
  check_fit(fit, bits);
  return packed;
}

Tensor unpack(Tensor packed, int64_t bits, int64_t length, bool is_signed) {
  check_bits(bits);
  check(packed.dim() >= 1, "packed needs at least one dimension");
  check_type(packed, ScalarType::Byte, "packed");
  check(length >= 0, "length=", length, " is negative");
  const int64_t row_bytes = packed_row_bytes(length, static_cast<int>(bits));
  check(packed.size(packed.dim() - 1) == row_bytes, "packed has ", packed.size(packed.dim() - 1), " bytes a row; ",
        length, " codes of bits=", bits, " take ", row_bytes);
  const Tensor input = as_contiguous(packed);
  Tensor codes = new_tensor(with_last(input, length), is_signed ? ScalarType::Char : ScalarType::Byte);
  const int64_t rows = length == 0 ? 0 : product(codes.sizes()) / length;
  const auto* in = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  parallel_for(rows, kGrain / std::max<int64_t>(length, 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      unpack_rows(in + r * row_bytes, 1, length, static_cast<int>(bits), out + r * length);
      if (is_signed) to_signed(out + r * length, length, 1u << (bits - 1));
    }
  });
  return codes;
}

Tensor pack_tiles(Tensor codes, int64_t bits, int64_t group_size) {
  check(codes.dim() == 2, "a tiles weight has two dimensions, codes have ", codes.dim());
  const TileShape shape = tile_shape(codes.size(0), codes.size(1), group_size, bits);
  const unsigned offset = offset_of(codes, bits);
  const Tensor input = as_contiguous(codes);
  Tensor packed = new_tensor({shape.panels(), shape.panel_bytes()}, ScalarType::Byte);
  const auto* in = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const int64_t panel_codes = kPanel * shape.in_features;
  std::atomic<bool> fit{true};
  parallel_for(shape.panels(), kGrain / std::max<int64_t>(panel_codes, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> rows(static_cast<size_t>(panel_codes));
    for (int64_t p = begin; p < end; ++p) {
      const TileShape part = one_panel(shape, p);
      const int64_t count = part.out_features * part.in_features;
      if (!to_unsigned(in + p * panel_codes, count, offset, bits, rows.data())) fit = false;
      halfbyte::pack_tiles(rows.data(), part, 0, 1, out + p * shape.panel_bytes());
    }
  });
  check_fit(fit, bits);
  return packed;
}

Tensor unpack_tiles(Tensor packed, int64_t bits, int64_t out_features, int64_t in_features, int64_t group_size,
                    bool is_signed) {
  const TileShape shape = tile_shape(out_features, in_features, group_size, bits);
  check_type(packed, ScalarType::Byte, "packed");
  check(packed.dim() == 2 && packed.size(0) == shape.panels() && packed.size(1) == shape.panel_bytes(),
        "packed does not have the shape (", shape.panels(), ", ", shape.panel_bytes(), ") of a (", out_features, ", ",
        in_features, ") weight with bits=", bits, " and group_size=", group_size);
  const Tensor input = as_contiguous(packed);
  Tensor codes = new_tensor({out_features, in_features}, is_signed ? ScalarType::Char : ScalarType::Byte);
  const auto* in = static_cast<const uint8_t*>(input.const_data_ptr());
  auto* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const int64_t panel_codes = kPanel * shape.in_features;
  parallel_for(shape.panels(), kGrain / std::max<int64_t>(panel_codes, 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const TileShape part = one_panel(shape, p);
      halfbyte::unpack_tiles(in + p * shape.panel_bytes(), part, 0, 1, out + p * panel_codes);
      if (is_signed) to_signed(out + p * panel_codes, part.out_features * part.in_features, 1u << (bits - 1));
    }
  });
  return codes;
}

}  // namespace halfbyte::ops
