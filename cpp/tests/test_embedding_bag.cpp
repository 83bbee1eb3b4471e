// Weighted sums of packed rows: every level gives the bits of the formula in embedding_bag.h, and reads no byte past
// the end of a row.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "halfbyte/dispatch.h"
#include "halfbyte/packing.h"

using namespace halfbyte;

namespace {

uint64_t next_random() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// A table with rows of codes, and a bag of all of them.
struct Case {
  std::vector<uint8_t> codes;  // [rows, dim], one byte each
  std::vector<uint8_t> packed, zero;
  std::vector<float> scale, weights;
  std::vector<uint16_t> half_scale;
  std::vector<int64_t> ids;
  BagTable table{};
  Bag bag{};

  Case(int bits, int64_t dim, int64_t group_size, int64_t count, bool zero_points, bool half, bool weighted, bool add) {
    const int64_t groups = dim / group_size, row_bytes = packed_row_bytes(dim, bits);
    const auto qparams = static_cast<size_t>(count * groups);
    for (int64_t i = 0; i < count * dim; ++i) codes.push_back(static_cast<uint8_t>(next_random() & ((1u << bits) - 1)));
    packed.resize(static_cast<size_t>(count * row_bytes));  // no byte more: sanitizers see a read past the last row
    pack_rows(codes.data(), count, dim, bits, packed.data());
    for (size_t i = 0; i < qparams; ++i) {
      half_scale.push_back(static_cast<uint16_t>(0x3c00 + (next_random() & 0xff)));  // bfloat16, below 2
      const uint32_t full = half ? uint32_t{half_scale.back()} << 16 : std::bit_cast<uint32_t>(random_float());
      scale.push_back(std::bit_cast<float>(full));
      zero.push_back(static_cast<uint8_t>(next_random() & ((1u << bits) - 1)));
    }
    for (int64_t i = 0; i < count; ++i) ids.push_back(count - 1 - i), weights.push_back(random_float());
    table = {.codes = packed.data(),
             .row_bytes = row_bytes,
             .scale = half ? static_cast<const void*>(half_scale.data()) : scale.data(),
             .scale_type = half ? FloatType::kBFloat16 : FloatType::kFloat32,
             .zero_point = zero_points ? zero.data() : nullptr,
             .zero = 1 << (bits - 1),
             .dim = dim,
             .group_size = group_size,
             .bits = bits};
    bag = {.ids = ids.data(),
           .count = count,
           .readable = count,
           .weights = weighted ? weights.data() : nullptr,
           .padding_row = count > 2 ? 2 : -1,
           .add = add};
  }

  static float random_float() { return static_cast<float>(next_random() >> 40) * 0x1p-24f - 0.5f; }

  void add_exactly(std::vector<float>& sum) const {
    const int64_t groups = table.dim / table.group_size;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] == bag.padding_row) continue;
      for (int64_t e = 0; e < table.dim; ++e) {
        const auto at = static_cast<size_t>(ids[i] * groups + e / table.group_size);
        const float factor = (bag.weights == nullptr ? 1.f : weights[i]) * scale[at];
        const int32_t code = codes[static_cast<size_t>(ids[i] * table.dim + e)];
        float& element = sum[static_cast<size_t>(e)];
        const int32_t zero_point = table.zero_point == nullptr ? table.zero : zero[at];
        element = std::fma(factor, static_cast<float>(code - zero_point), element);
      }
    }
  }
};

void check_sum(const char* level, int bits, int64_t dim, int64_t group_size, int64_t count) {
  for (int variant = 0; variant < 16; ++variant) {
    const bool add = variant & 8;
    const Case c(bits, dim, group_size, count, variant & 1, variant & 2, variant & 4, add);
    std::vector<float> sum(static_cast<size_t>(dim), 123.f), expected(sum.size(), add ? 123.f : 0.f);
    kernels().embedding_bag.sum_rows(c.table, c.bag, sum.data());
    c.add_exactly(expected);
    for (size_t e = 0; e < sum.size(); ++e) {
      if (std::bit_cast<uint32_t>(sum[e]) == std::bit_cast<uint32_t>(expected[e])) continue;
      std::fprintf(stderr, "%s: %d bits, dim %lld, group %lld, %lld rows, variant %d: element %zu is %g, not %g\n",
                   level, bits, static_cast<long long>(dim), static_cast<long long>(group_size),
                   static_cast<long long>(count), variant, e, double{sum[e]}, double{expected[e]});
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  for (const std::string& level : supported_levels()) {
    set_active_level(level);
    for (const int bits : {8, 4, 2}) {
      for (const int64_t dim : {1, 3, 15, 16, 17, 64, 96, 128, 129, 200, 512}) {
        for (const int64_t count : {0, 1, 7, 40}) check_sum(level.c_str(), bits, dim, dim, count);
      }
      for (const int64_t groups : {2, 3, 8}) {
        check_sum(level.c_str(), bits, groups * bag_vector(bits), bag_vector(bits), 5);
      }
    }
  }
  std::printf("embedding_bag: all levels agree\n");
  return 0;
}
