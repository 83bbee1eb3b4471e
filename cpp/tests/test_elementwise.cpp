// Every compiled and supported level against the plain loops of elementwise_reference.cpp, bit for bit, over types,
// granularities, awkward lengths, NaN, infinities and both zeros.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "elementwise_reference.h"
#include "halfbyte/dispatch.h"
#include "testing.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

constexpr CodeType kCodeTypes[] = {CodeType::kInt8, CodeType::kUInt8, CodeType::kInt32};

size_t code_bytes(CodeType code) { return code == CodeType::kInt32 ? 4 : 1; }

// Random values with special ones among them (NaN and infinities only if asked for).
Bytes random_floats(int64_t count, FloatType type, float spread, bool specials) {
  const float special[] = {kNaN, kInf, -kInf, 0.f, -0.f, 1e30f, -1e30f, 0.5f, -0.5f, 1e-40f, 2.5f};
  Bytes bytes(static_cast<size_t>(count) * bytes_of(type));
  for (int64_t i = 0; i < count; ++i) {
    const float value = random_unit() * spread;
    const bool use_special = specials && i % 5 == 3;
    reference::from_float(use_special ? special[i / 5 % 11] : value, bytes.data(), type, i);
  }
  return bytes;
}

bool equal_floats(const Bytes& a, const Bytes& b, FloatType type) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size() / bytes_of(type); ++i) {
    if (std::memcmp(&a[i * bytes_of(type)], &b[i * bytes_of(type)], bytes_of(type)) == 0) continue;
    const float left = reference::to_float(a.data(), type, static_cast<int64_t>(i));
    const float right = reference::to_float(b.data(), type, static_cast<int64_t>(i));
    if (!(std::isnan(left) && std::isnan(right))) return false;
  }
  return true;
}

// qparams for `channels`, with the arrays of the advancing form where run_length is 1.
struct Qparams {
  std::vector<float> scale, inverse;
  std::vector<int32_t> zero_point;
  AffineGrid grid;
  Qparams(int64_t channels, int64_t run_length, int32_t qmin, int32_t qmax) {
    const bool advancing = run_length == 1 && channels >= kElementLanes;
    for (int64_t c = 0; c < channels; ++c) {
      scale.push_back(std::exp2(random_unit() * 4.f) * 0.1f);
      zero_point.push_back(qmin + static_cast<int32_t>((random_unit() + 1.f) * 0.5f * static_cast<float>(qmax - qmin)));
    }
    if (advancing) {
      for (int64_t c = 0; c < kElementLanes - 1; ++c) {
        scale.push_back(scale[static_cast<size_t>(c)]);
        zero_point.push_back(zero_point[static_cast<size_t>(c)]);
      }
    }
    for (float s : scale) inverse.push_back(1.f / s);
    grid = {.scale = scale.data(),
            .zero_point = zero_point.data(),
            .channels = channels,
            .run_length = run_length,
            .qmin = qmin,
            .qmax = qmax,
            .inverse_scale = advancing ? inverse.data() : nullptr};
  }
};

// Calls f(begin, end) for a cut of [0, count) such as threads make.
template <class F>
void in_ranges(int64_t count, F f) {
  const int64_t cut = std::min(count, round_up(count / 3, kElementBlock));
  f(int64_t{0}, cut);
  f(cut, count);
}

void check_affine(const ElementwiseKernels& kernels, FloatType type, int64_t count, int64_t channels,
                  int64_t run_length) {
  const Bytes x = random_floats(count, type, 30.f, true);
  const size_t mask_bytes = static_cast<size_t>(ceil_div(count, 8));
  for (auto [qmin, qmax] : {std::pair{-128, 127}, {0, 255}, {-8, 7}, {0, 1}, {-1, 1}, {-32768, 32767}}) {
    const Qparams q(channels, run_length, qmin, qmax);
    Bytes expected(x.size()), got(x.size());
    std::vector<uint8_t> expected_mask(mask_bytes), mask(mask_bytes, 0xff);
    reference::fake_quantize(x.data(), expected.data(), expected_mask.data(), type, q.grid, count);
    in_ranges(count, [&](int64_t begin, int64_t end) {
      kernels.fake_quantize(x.data(), got.data(), mask.data(), type, q.grid, begin, end);
    });
    CHECK(equal_floats(expected, got, type), "fake_quantize, type %d, count %d, channels %d, run %d, qmax %d",
          int(type), int(count), int(channels), int(run_length), qmax);
    CHECK(expected_mask == mask, "mask, type %d, count %d, channels %d, run %d, qmax %d", int(type), int(count),
          int(channels), int(run_length), qmax);
    std::fill(got.begin(), got.end(), uint8_t{0});
    in_ranges(count, [&](int64_t begin, int64_t end) {
      kernels.fake_quantize(x.data(), got.data(), nullptr, type, q.grid, begin, end);
    });
    CHECK(equal_floats(expected, got, type), "fake_quantize without mask, count %d", int(count));

    reference::mask_gradient(x.data(), mask.data(), expected.data(), type, count);
    in_ranges(count, [&](int64_t begin, int64_t end) {
      kernels.mask_gradient(x.data(), mask.data(), got.data(), type, begin, end);
    });
    CHECK(equal_floats(expected, got, type), "mask_gradient, type %d, count %d", int(type), int(count));

    for (CodeType code : kCodeTypes) {
      if (code == CodeType::kInt8 && (qmin < -128 || qmax > 127)) continue;
      if (code == CodeType::kUInt8 && (qmin < 0 || qmax > 255)) continue;
      Bytes codes(static_cast<size_t>(count) * code_bytes(code)), expected_codes(codes.size());
      reference::quantize(x.data(), type, expected_codes.data(), code, q.grid, count);
      in_ranges(count, [&](int64_t begin, int64_t end) {
        kernels.quantize(x.data(), type, codes.data(), code, q.grid, begin, end);
      });
      CHECK(codes == expected_codes, "quantize, type %d, code %d, count %d, run %d", int(type), int(code), int(count),
            int(run_length));
      reference::dequantize(codes.data(), code, expected.data(), type, q.grid, count);
      in_ranges(count, [&](int64_t begin, int64_t end) {
        kernels.dequantize(codes.data(), code, got.data(), type, q.grid, begin, end);
      });
      CHECK(equal_floats(expected, got, type), "dequantize, type %d, code %d, count %d", int(type), int(code),
            int(count));
    }
  }
}

void check_minmax(const ElementwiseKernels& kernels, FloatType type, int64_t rows, int64_t columns, bool specials) {
  const Bytes x = random_floats(rows * columns, type, 3.f, specials);
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float left, float right) {
      return std::isnan(left) ? std::isnan(right) : std::bit_cast<uint32_t>(left) == std::bit_cast<uint32_t>(right);
    });
  };
  std::vector<float> lo(static_cast<size_t>(rows)), hi(lo), expected_lo(lo), expected_hi(lo);
  reference::minmax_runs(x.data(), type, columns, rows, expected_lo.data(), expected_hi.data());
  kernels.minmax_runs(x.data(), type, columns, 0, rows, lo.data(), hi.data());
  CHECK(same(lo, expected_lo) && same(hi, expected_hi), "minmax_runs, type %d, %d x %d", int(type), int(rows),
        int(columns));
  lo.assign(static_cast<size_t>(columns), kInf);
  hi.assign(static_cast<size_t>(columns), -kInf);
  expected_lo = lo, expected_hi = hi;
  reference::minmax_columns(x.data(), type, columns, rows, expected_lo.data(), expected_hi.data());
  kernels.minmax_columns(x.data(), type, columns, 0, rows / 2, lo.data(), hi.data());
  kernels.minmax_columns(x.data(), type, columns, rows / 2, rows, lo.data(), hi.data());
  CHECK(same(lo, expected_lo) && same(hi, expected_hi), "minmax_columns, type %d, %d x %d", int(type), int(rows),
        int(columns));
}

// All 2^16 halves one way; floats around every rounding boundary of the halves the other way.
void check_conversions(const ElementwiseKernels& kernels, FloatType type) {
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(halves.size());
  kernels.to_float(halves.data(), type, wide.data(), static_cast<int64_t>(halves.size()));
  std::vector<float> floats;
  for (size_t i = 0; i < halves.size(); ++i) {
    const float expected = reference::to_float(halves.data(), type, static_cast<int64_t>(i));
    CHECK(std::isnan(expected) ? std::isnan(wide[i])
                               : std::bit_cast<uint32_t>(wide[i]) == std::bit_cast<uint32_t>(expected),
          "to_float, type %d, %zx", int(type), i);
    if (!std::isfinite(expected)) continue;
    const float next =
        reference::to_float(halves.data(), type, static_cast<int64_t>(std::min(i + 1, halves.size() - 1)));
    const float middle = std::isfinite(next) ? 0.5f * expected + 0.5f * next : expected * 1.001f;
    for (float value : {expected, middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)}) {
      floats.push_back(value);
    }
  }
  for (float value : {kNaN, -kNaN, kInf, -kInf, 65519.99f, 65520.f, -65520.f, 1e38f, 3.4e38f, 1e-45f}) {
    floats.push_back(value);
  }
  std::vector<uint16_t> narrowed(floats.size()), expected(floats.size());
  kernels.from_float(floats.data(), type, narrowed.data(), static_cast<int64_t>(floats.size()));
  for (size_t i = 0; i < floats.size(); ++i) {
    reference::from_float(floats[i], expected.data(), type, static_cast<int64_t>(i));
    const bool nan =
        std::isnan(floats[i]) && std::isnan(reference::to_float(narrowed.data(), type, static_cast<int64_t>(i)));
    CHECK(nan || narrowed[i] == expected[i], "from_float, type %d, %a gives %x, not %x", int(type), double(floats[i]),
          narrowed[i], expected[i]);
  }
}

void check_search(const ElementwiseKernels& kernels, const ElementwiseKernels& scalar) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t count : {1, 15, 16, 17, 32, 100, 257}) {
      std::vector<float> w(static_cast<size_t>(count)), importance(w.size());
      for (float& value : w) value = random_unit() * random_unit() * random_unit();
      for (float& value : importance) value = std::fabs(random_unit());
      for (bool symmetric : {false, true}) {
        for (const float* weights :
             {static_cast<const float*>(nullptr), static_cast<const float*>(importance.data())}) {
          for (FloatType type : kFloatTypes) {
            const SearchOptions options = {.bits = bits,
                                           .symmetric = symmetric,
                                           .narrow_range = symmetric && bits == 8,
                                           .steps = 20,
                                           .shrink_step = 0.04f,
                                           .scale_type = type};
            float scale, loss, other_scale, other_loss;
            int32_t zero_point, other_zero_point;
            kernels.search_qparams(w.data(), weights, count, options, &scale, &zero_point, &loss);
            scalar.search_qparams(w.data(), weights, count, options, &other_scale, &other_zero_point, &other_loss);
            CHECK(scale == other_scale && zero_point == other_zero_point && loss == other_loss,
                  "search_qparams differs from the scalar level, bits %d, count %d", bits, int(count));
            const double error = reference::search_error(w.data(), weights, count, options, scale, zero_point);
            CHECK(std::fabs(error - double(loss)) <= 1e-5 * error + 1e-12, "loss %g, reference %g, bits %d, count %d",
                  double(loss), error, bits, int(count));
            SearchOptions minmax = options;
            minmax.steps = 1;
            kernels.search_qparams(w.data(), weights, count, minmax, &other_scale, &other_zero_point, &other_loss);
            CHECK(loss <= other_loss, "the search loses more than min/max, bits %d, count %d", bits, int(count));
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const std::string& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const ElementwiseKernels& active = kernels().elementwise;
    for (FloatType type : kFloatTypes) {
      for (int64_t count : {0, 1, 15, 16, 17, 63, 64, 65, 200, 1000}) {
        check_affine(active, type, count, 1, std::max<int64_t>(count, 1));  // per tensor
        check_affine(active, type, count, 1000, 7);
        check_affine(active, type, count, 7, 1);
        check_affine(active, type, count, 40, 32);  // per group
        check_affine(active, type, count, 3, 50);   // per axis
        check_affine(active, type, count, 16, 1);   // last axis
        check_affine(active, type, count, 37, 1);
      }
      for (int64_t rows : {0, 1, 2, 9}) {
        for (int64_t columns : {1, 15, 16, 17, 100, 600}) {
          check_minmax(active, type, rows, columns, false);
          check_minmax(active, type, rows, columns, true);
        }
      }
      if (type != FloatType::kFloat32) check_conversions(active, type);
    }
    check_search(active, scalar::kernel_table.elementwise);
  }
  std::puts("elementwise: every supported level equals the reference");
}
