// Every level's matrix kernels against the reference, bit for bit: all widths, odd shapes, groups, zero points, scale
// types, partial row and panel ranges, extreme values, and inputs around kMaxChunk.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "halfbyte/dispatch.h"
#include "matmul_reference.h"
#include "testing.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-30f; }

enum class Values { kRandom, kLargest };  // of codes and activations

struct Case {
  TileShape shape;
  int64_t rows;
  FloatType scale_type = FloatType::kFloat32;
  bool zero_points = false, bias = false, codebook = false;
  int act_zero_point = 0;
  bool static_scale = false;
  Values values = Values::kRandom;
};

std::string name_of(const Case& c) {
  return "bits " + std::to_string(c.shape.bits) + ", O " + std::to_string(c.shape.out_features) + ", I " +
         std::to_string(c.shape.in_features) + ", group " + std::to_string(c.shape.group_size) + ", M " +
         std::to_string(c.rows) + ", zero points " + std::to_string(c.zero_points) + ", codebook " +
         std::to_string(c.codebook) + ", act zero point " + std::to_string(c.act_zero_point);
}

template <class T>
using Buffer = std::vector<T>;

// Operands of one case. Buffers have exactly the size that matmul.h states, so that sanitizers see any read past it.
struct Problem {
  explicit Problem(const Case& c_) : c(c_) {
    const TileShape& s = c.shape;
    const bool largest = c.values == Values::kLargest;
    Buffer<uint8_t> plain(static_cast<size_t>(s.out_features * s.in_features));
    for (uint8_t& u : plain) {
      u = static_cast<uint8_t>((largest ? ~0u : random_bits()) & ((1u << s.bits) - 1u));
    }
    codes.resize(static_cast<size_t>(s.panels() * s.panel_bytes()));
    pack_tiles(plain.data(), s, 0, s.panels(), codes.data());
    const auto qparams = static_cast<size_t>(s.groups() * s.out_features);
    scale32.resize(qparams);
    scale16.resize(qparams);
    zero.resize(qparams);
    for (size_t i = 0; i < qparams; ++i) {
      scale32[i] = 0.01f + std::fabs(random_float()) * 0.01f;
      scale16[i] = static_cast<uint16_t>(random_bits() & 0xbbffu);  // any finite half or bfloat16, subnormals too
      zero[i] = static_cast<uint8_t>(random_bits() & ((1u << s.bits) - 1u));
    }
    x.resize(static_cast<size_t>(c.rows * s.in_features));
    for (float& value : x) value = largest ? 1.0f : random_float();
    bias.resize(static_cast<size_t>(s.out_features));
    for (float& value : bias) value = random_float();
    codebook.resize(static_cast<size_t>(kCodebookEntries));
    for (float& value : codebook) value = random_float();
  }
  TiledWeight weight() const {
    const bool full = c.scale_type == FloatType::kFloat32;
    return {.shape = c.shape,
            .codes = codes.data(),
            .scale = full ? static_cast<const void*>(scale32.data()) : scale16.data(),
            .scale_type = c.scale_type,
            .zero_point = c.zero_points ? zero.data() : nullptr,
            .codebook = c.codebook ? codebook.data() : nullptr};
  }

  Case c;
  Buffer<uint8_t> codes, zero;
  Buffer<float> scale32, x, bias, codebook;
  Buffer<uint16_t> scale16;
};

// Everything the kernels of one level make of a problem.
struct Result {
  Buffer<int8_t> codes;
  Buffer<float> scale, padded, group_sum, y_int8, y_float;
  Buffer<int32_t> chunk_sum;
};

Result run(const MatmulKernels& kernel, const Problem& problem) {
  const Case& c = problem.c;
  const TileShape& s = c.shape;
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  Result r;
  r.codes.resize(size(c.rows * code_stride(s)));
  r.scale.resize(size(c.rows));
  r.chunk_sum.resize(size(c.rows * s.groups() * chunks_per_group(s)));
  r.padded.resize(size(c.rows * float_stride(s)));
  r.group_sum.resize(size(c.rows * s.groups()));
  r.y_int8.assign(size(c.rows * s.out_features), -1.0f);
  r.y_float.assign(size(c.rows * s.out_features), -1.0f);
  const QuantizedRows rows = {r.codes.data(), r.scale.data(), r.chunk_sum.data(), c.act_zero_point};
  const int64_t ldx = s.in_features, ldy = s.out_features;
  if (c.static_scale) {
    kernel.quantize_rows_static(problem.x.data(), ldx, 0, c.rows, s, 0.013f, rows);
  } else {
    kernel.quantize_rows_dynamic(problem.x.data(), ldx, 0, c.rows, s, rows);
  }
  kernel.pad_rows(problem.x.data(), ldx, 0, c.rows, s, r.padded.data(), r.group_sum.data());

  Buffer<std::byte> scratch(size(kernel.scratch_bytes(s)) + 64, std::byte{0xff});
  void* memory = scratch.data();
  size_t room = scratch.size();
  memory = std::align(64, room - 64, memory, room);
  const TiledWeight w = problem.weight();
  const float* bias = c.bias ? problem.bias.data() : nullptr;
  // In two ranges of rows and two of panels, as threads would.
  const int64_t middle = c.rows / 3, split = s.panels() / 2;
  for (const auto& [row, row_end] : {std::pair{int64_t{0}, middle}, std::pair{middle, c.rows}}) {
    for (const auto& [panel, panel_end] : {std::pair{int64_t{0}, split}, std::pair{split, s.panels()}}) {
      if (!c.codebook) kernel.matmul_int8(w, rows, row, row_end, panel, panel_end, bias, r.y_int8.data(), ldy, memory);
      kernel.matmul_float(w, r.padded.data(), r.group_sum.data(), row, row_end, panel, panel_end, bias,
                          r.y_float.data(), ldy, memory);
    }
  }
  return r;
}

template <class T>
void check_equal(const Buffer<T>& got, const Buffer<T>& expected, const char* what, const Case& c) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::memcmp(&got[i], &expected[i], sizeof(T)) == 0, "%s: %s at %zu is %g, not %g", name_of(c).c_str(), what,
          i, static_cast<double>(got[i]), static_cast<double>(expected[i]));
  }
}

int64_t cases = 0;

void check_case(const Case& c) {
  const Problem problem(c);
  const Result expected = run(reference::matmul_kernels(), problem);
  for (const std::string& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const Result got = run(kernels().matmul, problem);
    check_equal(got.scale, expected.scale, "scale", c);
    check_equal(got.chunk_sum, expected.chunk_sum, "chunk_sum", c);
    check_equal(got.group_sum, expected.group_sum, "group_sum", c);
    const TileShape& s = c.shape;
    for (int64_t row = 0; row < c.rows; ++row) {  // between padded_in() and the stride anything may stand
      const auto padded = static_cast<size_t>(s.padded_in());
      CHECK(std::memcmp(&got.codes[static_cast<size_t>(row * code_stride(s))],
                        &expected.codes[static_cast<size_t>(row * code_stride(s))], padded) == 0,
            "%s: codes of row %d", name_of(c).c_str(), int(row));
      CHECK(std::memcmp(&got.padded[static_cast<size_t>(row * float_stride(s))],
                        &expected.padded[static_cast<size_t>(row * float_stride(s))], padded * 4) == 0,
            "%s: padded row %d", name_of(c).c_str(), int(row));
    }
    check_equal(got.y_int8, expected.y_int8, "y of int8 x", c);
    check_equal(got.y_float, expected.y_float, "y of float x", c);
    ++cases;
  }
}

// The reference itself against float64 sums.
void check_accuracy(const Case& c) {
  const Problem problem(c);
  const TileShape& s = c.shape;
  const Result r = run(reference::matmul_kernels(), problem);
  Buffer<uint8_t> u(static_cast<size_t>(s.out_features * s.in_features));
  unpack_tiles(problem.codes.data(), s, 0, s.panels(), u.data());
  const bool binary = s.bits == 1 && !c.zero_points;
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t o = 0; o < s.out_features; ++o) {
      double exact = 0, from_codes = 0, size = 0;
      for (int64_t k = 0; k < s.in_features; ++k) {
        const int64_t g = k / s.group_size, at = g * s.out_features + o;
        const int z = c.zero_points ? problem.zero[static_cast<size_t>(at)] : binary ? 1 : 1 << (s.bits - 1);
        const uint8_t code = u[static_cast<size_t>(o * s.in_features + k)];
        const double value = c.codebook ? static_cast<double>(problem.codebook[code]) : code * (binary ? 2 : 1) - z;
        const double w = value * static_cast<double>(problem.scale32[static_cast<size_t>(at)]);
        const int a = r.codes[static_cast<size_t>(row * code_stride(s) + g * s.padded_group() + k % s.group_size)];
        const double x = problem.x[static_cast<size_t>(row * s.in_features + k)];
        exact += w * x;
        from_codes += w * (a - c.act_zero_point) * static_cast<double>(r.scale[static_cast<size_t>(row)]);
        size += std::fabs(w * x);
      }
      const auto at = static_cast<size_t>(row * s.out_features + o);
      CHECK(c.codebook || std::fabs(r.y_int8[at] - from_codes) <= 1e-6 * size + 1e-6, "%s: %g, not %g",
            name_of(c).c_str(), static_cast<double>(r.y_int8[at]), from_codes);
      CHECK(std::fabs(r.y_float[at] - exact) <= 1e-5 * size + 1e-6, "%s: %g, not %g", name_of(c).c_str(),
            static_cast<double>(r.y_float[at]), exact);
    }
  }
}

}  // namespace

int main() {
  for (int bits = 1; bits <= 8; ++bits) {
    const auto shape = [&](int64_t out, int64_t in, int64_t group) {
      return TileShape{.out_features = out, .in_features = in, .group_size = group, .bits = bits};
    };
    for (bool zero_points : {false, true}) {
      check_accuracy({.shape = shape(18, 70, 32), .rows = 3, .zero_points = zero_points});
      // Rows around the direct, tile and slab limits; panels around a tile.
      for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13}) {
        for (int64_t out : {1, 16, 33, 64, 81, 150}) {
          check_case({.shape = shape(out, 96, 32), .rows = rows, .zero_points = zero_points, .bias = rows % 2 == 0});
        }
      }
      check_case({.shape = shape(20, 64, 64), .rows = 247, .zero_points = zero_points});
      // Many rows: tiles of 16 (also one that begins inside another), groups around whole ones and around blocks.
      for (int64_t group : {32, 70, 128, 449}) {
        for (int64_t groups : {1, 4}) {
          const int64_t rows = 24 + 13 * groups + group % 3;
          check_case({.shape = shape(37, group * groups, group), .rows = rows, .zero_points = zero_points});
          check_case({.shape = shape(50, group * groups, group),
                      .rows = rows + 9,
                      .zero_points = zero_points,
                      .bias = true,
                      .act_zero_point = 5,
                      .static_scale = true});
        }
      }
      // Inputs around units and blocks, groups that do not fill a unit, a last group that is short.
      for (int64_t in : {1, 3, 4, 31, 33, 127, 130, 513, 2100}) {
        for (int64_t group : {in, int64_t{4}, int64_t{7}, int64_t{32}, int64_t{128}}) {
          if (group > in) continue;
          const int64_t rows = in % 2 == 0 ? 9 : 2;
          check_case({.shape = shape(35, in, group), .rows = rows, .zero_points = zero_points});
          check_case({.shape = shape(35, in, group),
                      .rows = rows,
                      .scale_type = FloatType::kFloat16,
                      .zero_points = zero_points,
                      .bias = true,
                      .act_zero_point = -17,
                      .static_scale = true});
        }
      }
      for (FloatType type : {FloatType::kFloat16, FloatType::kBFloat16}) {
        check_case({.shape = shape(40, 64, 16), .rows = 5, .scale_type = type, .zero_points = zero_points});
      }
      for (int zero : {-128, -1, 127}) {
        check_case({.shape = shape(70, 300, 100),
                    .rows = 8,
                    .zero_points = zero_points,
                    .act_zero_point = zero,
                    .static_scale = true});
      }
      // The largest sums: 2^15 inputs with every code and activation at its end, with and without a chunk boundary.
      for (int64_t in : {kMaxChunk - 1, kMaxChunk, kMaxChunk + 40}) {
        for (int zero : {0, 127, -128}) {
          check_case({.shape = shape(3, in, in),
                      .rows = 1,
                      .zero_points = zero_points,
                      .act_zero_point = zero,
                      .static_scale = true,
                      .values = Values::kLargest});
        }
        check_case({.shape = shape(3, in, in), .rows = 5, .zero_points = zero_points, .values = Values::kLargest});
      }
    }
    check_case({.shape = shape(3, kMaxChunk + 40, kMaxChunk + 40), .rows = 25, .values = Values::kLargest});
    check_case({.shape = shape(5, 0, 1), .rows = 2, .bias = true});
    if (bits > 4) continue;
    check_accuracy({.shape = shape(18, 70, 32), .rows = 3, .codebook = true});
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 247}) {
      for (int64_t out : {1, 33, 81}) {
        check_case({.shape = shape(out, 96, 32), .rows = rows, .bias = rows % 2 == 0, .codebook = true});
      }
    }
    for (int64_t in : {1, 31, 130, 2100}) {
      for (int64_t group : {in, int64_t{7}, int64_t{64}}) {
        if (group > in) continue;
        check_case({.shape = shape(35, in, group), .rows = 1, .scale_type = FloatType::kFloat16, .codebook = true});
        check_case({.shape = shape(35, in, group), .rows = 9, .codebook = true});
      }
    }
  }
  // Rows with infinities, NaN and zeros.
  for (const std::string& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const TileShape s = {.out_features = 1, .in_features = 4, .group_size = 4, .bits = 8};
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
    const float x[] = {nan, 1.0f, -2.0f, 0.5f, inf, 1.0f, -1.0f, nan, 0.0f, -0.0f, 0.0f, 0.0f};
    Buffer<int8_t> codes(static_cast<size_t>(3 * code_stride(s)));
    float scale[3];
    int32_t sums[3];
    kernels().matmul.quantize_rows_dynamic(x, 4, 0, 3, s, {codes.data(), scale, sums, 0});
    const int8_t expected[3][4] = {{0, 64, -127, 32}, {0, 0, 0, 0}, {0, 0, 0, 0}};
    for (int row = 0; row < 3; ++row) {
      CHECK(std::memcmp(&codes[static_cast<size_t>(row * code_stride(s))], expected[row], 4) == 0, "row %d", row);
    }
  }
  std::printf("matmul: %d cases are bit for bit those of the reference\n", int(cases));
}
