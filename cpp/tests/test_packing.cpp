// Both layouts against a bit-by-bit reading of their description in packing.h, for every width and awkward sizes.
#include <cstdio>
#include <vector>

#include "halfbyte/packing.h"
#include "testing.h"

using halfbyte::TileShape;

namespace {

std::vector<uint8_t> random_codes(int64_t count, int bits) {
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>(halfbyte::testing::random_bits() & ((1u << bits) - 1u));
  }
  return codes;
}

// Element i of a packed row, read as the header describes it.
unsigned row_code(const uint8_t* row, int64_t length, int64_t i, int bits) {
  unsigned code = 0;
  halfbyte::for_each_plane(bits, [&](int plane, int shift) {
    code |= ((row[i * plane / 8] >> (i * plane % 8)) & ((1u << plane) - 1u)) << shift;
    row += halfbyte::ceil_div(length * plane, 8);
  });
  return code;
}

// The code at panel row c and padded input position k of a panel, read as the header describes it.
unsigned tile_code(const uint8_t* panel, int64_t c, int64_t k, int bits) {
  const uint8_t* plane_begin = panel + k / halfbyte::k_unit(bits) * halfbyte::unit_bytes(bits);
  const int64_t in_unit = k % halfbyte::k_unit(bits);
  unsigned code = 0;
  halfbyte::for_each_plane(bits, [&](int plane, int shift) {
    const int64_t inputs_per_row = 4 * (8 / plane);
    const int64_t row = in_unit / inputs_per_row, t = in_unit % inputs_per_row / 4, j = in_unit % 4;
    const uint8_t byte = plane_begin[row * 64 + c * 4 + j];
    code |= ((byte >> (plane * t)) & ((1u << plane) - 1u)) << shift;
    plane_begin += halfbyte::kPanel * halfbyte::k_unit(bits) * plane / 8;
  });
  return code;
}

void check_rows(int64_t rows, int64_t length, int bits) {
  const std::vector<uint8_t> codes = random_codes(rows * length, bits);
  const int64_t row_bytes = halfbyte::packed_row_bytes(length, bits);
  std::vector<uint8_t> packed(static_cast<size_t>(rows * row_bytes), 0xa5);
  halfbyte::pack_rows(codes.data(), rows, length, bits, packed.data());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < length; ++i) {
      const unsigned got = row_code(packed.data() + row * row_bytes, length, i, bits);
      CHECK(got == codes[static_cast<size_t>(row * length + i)], "bits %d, row %d, element %d", bits, int(row), int(i));
    }
  }
  std::vector<uint8_t> unpacked(codes.size(), 0x5a);
  halfbyte::unpack_rows(packed.data(), rows, length, bits, unpacked.data());
  CHECK(unpacked == codes, "bits %d, %d x %d", bits, int(rows), int(length));
}

void check_tiles(const TileShape& shape) {
  const std::vector<uint8_t> codes = random_codes(shape.out_features * shape.in_features, shape.bits);
  std::vector<uint8_t> packed(static_cast<size_t>(shape.panels() * shape.panel_bytes()), 0xa5);
  halfbyte::pack_tiles(codes.data(), shape, 0, shape.panels(), packed.data());
  for (int64_t o = 0; o < shape.panels() * halfbyte::kPanel; ++o) {
    const uint8_t* panel = packed.data() + o / halfbyte::kPanel * shape.panel_bytes();
    for (int64_t k = 0; k < shape.padded_in(); ++k) {
      const int64_t in_group = k % shape.padded_group();
      const int64_t input = k / shape.padded_group() * shape.group_size + in_group;
      const bool present = o < shape.out_features && in_group < shape.group_size && input < shape.in_features;
      const unsigned expected = present ? codes[static_cast<size_t>(o * shape.in_features + input)] : 0u;
      CHECK(tile_code(panel, o % halfbyte::kPanel, k, shape.bits) == expected,
            "bits %d, O %d, I %d, group %d at (%d, %d)", shape.bits, int(shape.out_features), int(shape.in_features),
            int(shape.group_size), int(o), int(k));
    }
  }
  std::vector<uint8_t> unpacked(codes.size(), 0x5a);
  halfbyte::unpack_tiles(packed.data(), shape, 0, shape.panels(), unpacked.data());
  CHECK(unpacked == codes, "bits %d, O %d, I %d", shape.bits, int(shape.out_features), int(shape.in_features));
  std::vector<uint8_t> row(static_cast<size_t>(shape.in_features));
  for (int64_t o = 0; o < shape.out_features; ++o) {
    halfbyte::unpack_tile_row(packed.data(), shape, o, row.data());
    const auto expected = codes.begin() + o * shape.in_features;
    CHECK(std::vector<uint8_t>(expected, expected + shape.in_features) == row, "row %d", int(o));
  }
}

}  // namespace

int main() {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t length : {0, 1, 3, 7, 8, 9, 31, 32, 33, 100}) {
      for (int64_t rows : {0, 1, 3}) check_rows(rows, length, bits);
    }
    for (int64_t out : {1, 15, 16, 17, 40}) {
      for (int64_t in : {1, 4, 5, 31, 32, 33, 64, 100}) {
        for (int64_t group : {in, int64_t{4}, int64_t{7}, int64_t{32}, int64_t{128}}) {
          check_tiles({.out_features = out, .in_features = in, .group_size = group, .bits = bits});
        }
      }
    }
    check_tiles({.out_features = 5, .in_features = 0, .group_size = 1, .bits = bits});
    check_tiles({.out_features = 0, .in_features = 8, .group_size = 8, .bits = bits});
  }
  std::puts("packing: both layouts match their description for 1 to 8 bits");
}
