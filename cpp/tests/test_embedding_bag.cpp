// Weighted sums of packed rows: every level gives the bits of the formula in embedding_bag.h, and reads no byte past
// the end of a row.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
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

std::vector<float> exact_sum(const std::vector<std::vector<uint8_t>>& codes, const BagRows& rows) {
  std::vector<float> sum(static_cast<size_t>(rows.dim), 0.f);
  const int64_t groups = rows.dim / rows.group_size;
  for (int64_t r = 0; r < rows.count; ++r) {
    for (int64_t e = 0; e < rows.dim; ++e) {
      const int64_t at = r * groups + e / rows.group_size;
      const int32_t difference = codes[static_cast<size_t>(r)][static_cast<size_t>(e)] - rows.zero[at];
      float& element = sum[static_cast<size_t>(e)];
      element = std::fma(rows.factor[at], static_cast<float>(difference), element);
    }
  }
  return sum;
}

void check_sum(const char* level, int bits, int64_t dim, int64_t group_size, int64_t count) {
  const int64_t groups = dim / group_size, row_bytes = packed_row_bytes(dim, bits);
  std::vector<std::vector<uint8_t>> codes(static_cast<size_t>(count));
  std::vector<std::unique_ptr<uint8_t[]>> packed;  // one allocation each: sanitizers see a read past the end
  std::vector<const uint8_t*> pointers;
  for (auto& row : codes) {
    for (int64_t e = 0; e < dim; ++e) row.push_back(static_cast<uint8_t>(next_random() & ((1u << bits) - 1)));
    packed.push_back(std::make_unique<uint8_t[]>(static_cast<size_t>(row_bytes)));
    pack_rows(row.data(), 1, dim, bits, packed.back().get());
    pointers.push_back(packed.back().get());
  }
  std::vector<float> factor(static_cast<size_t>(count * groups));
  std::vector<int32_t> zero(factor.size());
  for (float& f : factor) f = static_cast<float>(next_random() >> 40) * 0x1p-24f - 0.5f;
  for (int32_t& z : zero) z = static_cast<int32_t>(next_random() & ((1u << bits) - 1));
  const BagRows rows = {pointers.data(), factor.data(), zero.data(), count, dim, group_size, bits};
  std::vector<float> sum(static_cast<size_t>(dim), 123.f);
  kernels().embedding_bag.sum_rows(rows, sum.data());
  const std::vector<float> expected = exact_sum(codes, rows);
  for (size_t e = 0; e < sum.size(); ++e) {
    if (std::bit_cast<uint32_t>(sum[e]) == std::bit_cast<uint32_t>(expected[e])) continue;
    std::fprintf(stderr, "%s: %d bits, dim %lld, group %lld, %lld rows: element %zu is %g, not %g\n", level, bits,
                 static_cast<long long>(dim), static_cast<long long>(group_size), static_cast<long long>(count), e,
                 double{sum[e]}, double{expected[e]});
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (const std::string& level : supported_levels()) {
    set_active_level(level);
    for (const int bits : {8, 4, 2}) {
      for (const int64_t dim : {1, 3, 15, 16, 17, 64, 96, 128, 129, 200, 512}) {
        for (const int64_t count : {0, 1, 7}) check_sum(level.c_str(), bits, dim, dim, count);
      }
      for (const int64_t groups : {2, 3, 8}) {
        check_sum(level.c_str(), bits, groups * bag_vector(bits), bag_vector(bits), 5);
      }
    }
  }
  std::printf("embedding_bag: all levels agree\n");
  return 0;
}
