// Every level's convolution kernels against plain loops, bit for bit: all widths, kernels, strides, paddings,
// dilations, groups, transposed, depthwise, zero points, int8 results with residuals, partial runs of pixels and
// panels.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "halfbyte/conv.h"
#include "halfbyte/dispatch.h"
#include "testing.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

float random_float() { return static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-30f; }
size_t size(int64_t n) { return static_cast<size_t>(n); }

struct Case {
  int64_t channels, outputs, groups;
  int64_t in[3], kernel[3], stride[3], padding[3], dilation[3];
  bool transposed = false;
  int bits = 8;
  bool zero_points = false, bias = true, largest = false;
  int32_t act_zero_point = 0;
};

ConvShape shape_of(const Case& c) {
  ConvShape s = {};
  s.batch = 2, s.in_channels = c.channels, s.out_channels = c.outputs, s.groups = c.groups, s.transposed = c.transposed;
  for (int d = 0; d < 3; ++d) {
    s.in[d] = c.in[d], s.kernel[d] = c.kernel[d], s.stride[d] = c.stride[d], s.padding[d] = c.padding[d];
    s.dilation[d] = c.dilation[d];
    const int64_t reach = c.dilation[d] * (c.kernel[d] - 1) + 1;
    s.out[d] = c.transposed ? (c.in[d] - 1) * c.stride[d] - 2 * c.padding[d] + reach
                            : (c.in[d] + 2 * c.padding[d] - reach) / c.stride[d] + 1;
  }
  return s;
}

std::string name_of(const Case& c) {
  std::string text = "bits " + std::to_string(c.bits) + ", " + std::to_string(c.channels) + "-" +
                     std::to_string(c.outputs) + "/" + std::to_string(c.groups);
  for (int d = 0; d < 3; ++d) {
    text += ", in " + std::to_string(c.in[d]) + " kernel " + std::to_string(c.kernel[d]) + " stride " +
            std::to_string(c.stride[d]) + " padding " + std::to_string(c.padding[d]) + " dilation " +
            std::to_string(c.dilation[d]);
  }
  return text + (c.transposed ? ", transposed" : "") + ", zero points " + std::to_string(c.zero_points) + " " +
         std::to_string(c.act_zero_point);
}

// The input pixel of an output and a tap, by the definition of either kind of convolution; -1 outside.
int64_t input_pixel(const ConvShape& s, int64_t pixel, int64_t tap) {
  const int64_t o[3] = {pixel / s.out[2] / s.out[1], pixel / s.out[2] % s.out[1], pixel % s.out[2]};
  const int64_t k[3] = {tap / s.kernel[2] / s.kernel[1], tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
  int64_t index = 0;
  for (int d = 0; d < 3; ++d) {
    int64_t found = -1;
    for (int64_t i = 0; i < s.in[d]; ++i) {
      const bool reads = s.transposed ? i * s.stride[d] - s.padding[d] + k[d] * s.dilation[d] == o[d]
                                      : o[d] * s.stride[d] - s.padding[d] + k[d] * s.dilation[d] == i;
      if (reads) found = i;
    }
    if (found < 0) return -1;
    index = index * s.in[d] + found;
  }
  return index;
}

struct Problem {
  Case c;
  ConvShape s;
  TileShape t;
  std::vector<uint8_t> plain, packed, zero;
  std::vector<int8_t> x, residual;
  std::vector<float> scale, bias, act_scale;
  Requantization requantization;

  explicit Problem(const Case& c_) : c(c_), s(shape_of(c_)) {
    t = {.out_features = c.outputs, .in_features = s.row_inputs(), .group_size = s.row_inputs(), .bits = c.bits};
    plain.resize(size(t.out_features * t.in_features));
    for (uint8_t& u : plain) u = static_cast<uint8_t>((c.largest ? ~0u : random_bits()) & ((1u << c.bits) - 1u));
    packed.resize(size(t.panels() * t.panel_bytes()));
    pack_tiles(plain.data(), t, 0, t.panels(), packed.data());
    for (int64_t o = 0; o < c.outputs; ++o) {
      scale.push_back(0.001f + std::fabs(random_float()) * 0.001f);
      bias.push_back(random_float());
      zero.push_back(static_cast<uint8_t>(random_bits() & ((1u << c.bits) - 1u)));
    }
    x.resize(size(s.batch * s.in_pixels() * s.in_channels));
    for (int8_t& a : x) a = static_cast<int8_t>(c.largest ? -128 : random_bits());
    residual.resize(size(s.batch * s.out_pixels() * s.out_channels));
    for (int8_t& a : residual) a = static_cast<int8_t>(random_bits());
    act_scale = {0.011f, 0.017f};
    requantization = {.inverse_scale = 1.0f / 0.05f,
                      .zero_point = -3,
                      .lowest = -100,
                      .highest = 90,
                      .residual_scale = 0.02f,
                      .residual_zero_point = 7};
  }
  TiledWeight weight() const {
    return {.shape = t,
            .codes = packed.data(),
            .scale = scale.data(),
            .scale_type = FloatType::kFloat32,
            .zero_point = c.zero_points ? zero.data() : nullptr};
  }
  const float* bias_or_null() const { return c.bias ? bias.data() : nullptr; }
};

struct Result {
  std::vector<float> floats;
  std::vector<int8_t> codes, with_residual;
};

int8_t quantized(float y, const Requantization& r) {
  const float value = std::nearbyint(std::clamp(y * r.inverse_scale, static_cast<float>(r.lowest - r.zero_point),
                                                static_cast<float>(r.highest - r.zero_point)));
  return static_cast<int8_t>(static_cast<int32_t>(value) + r.zero_point);
}

Result reference(const Problem& p) {
  const ConvShape& s = p.s;
  const bool binary = p.c.bits == 1 && !p.c.zero_points;
  const int64_t inputs = s.group_inputs();
  Result r;
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t pixel = 0; pixel < s.out_pixels(); ++pixel) {
      for (int64_t o = 0; o < s.out_channels; ++o) {
        const int64_t group = o / s.group_outputs();
        const int z = p.c.zero_points ? p.zero[size(o)] : binary ? 1 : 1 << (p.c.bits - 1);
        int64_t sum = 0;
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const int64_t in = input_pixel(s, pixel, tap);
          if (in < 0) continue;
          for (int64_t i = 0; i < inputs; ++i) {
            const int a = p.x[size((n * s.in_pixels() + in) * s.in_channels + group * inputs + i)];
            const int u = p.plain[size(o * s.row_inputs() + tap * inputs + i)];
            sum += static_cast<int64_t>(a - p.c.act_zero_point) * ((binary ? 2 * u : u) - z);
          }
        }
        const float folded = std::fma(p.scale[size(o)], static_cast<float>(sum), 0.0f);
        const float act = p.act_scale[size(n)];
        const float y = p.c.bias ? std::fma(act, folded, p.bias[size(o)]) : act * folded;
        const float added = static_cast<float>(p.residual[r.floats.size()] - p.requantization.residual_zero_point) *
                            p.requantization.residual_scale;
        r.floats.push_back(y);
        r.codes.push_back(quantized(y, p.requantization));
        r.with_residual.push_back(quantized(y + added, p.requantization));
      }
    }
  }
  return r;
}

// 64-byte aligned scratch of exactly the size that is asked for, so that sanitizers see any write past it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(static_cast<std::byte*>(std::aligned_alloc(64, size(round_up(bytes, 64))))) {
    std::memset(bytes_, 0xff, size(bytes));
  }
  ~Scratch() { std::free(bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() { return bytes_; }

 private:
  std::byte* bytes_;
};

// In two runs of pixels (or lines) and two of panels (or channel blocks), as threads would.
void multiply(const Problem& p, const ConvKernels& kernel, bool depthwise, const ConvResults& to) {
  const ConvShape& s = p.s;
  std::vector<int32_t> sums(size(s.batch * s.in_pixels() * s.groups));
  kernel.sum_pixels(p.x.data(), static_cast<int64_t>(sums.size()), s.group_inputs(), sums.data());
  const ConvInput x = {p.x.data(), p.act_scale.data(), p.c.act_zero_point, sums.data()};
  for (int64_t n = 0; n < s.batch; ++n) {
    if (depthwise) {
      Scratch scratch(kernel.depthwise_scratch_bytes(s, p.t));
      const int64_t middle = s.out[1] / 2, block = std::min(kDepthwiseChannels, s.out_channels);
      for (const auto& [line, line_end] : {std::pair{int64_t{0}, middle}, std::pair{middle, s.out[1]}}) {
        for (const auto& [c, c_end] : {std::pair{int64_t{0}, block}, std::pair{block, s.out_channels}}) {
          kernel.depthwise_lines(s, p.weight(), x, to, n, c, c_end, line, line_end, p.bias_or_null(), scratch.get());
        }
      }
      continue;
    }
    const int64_t middle = s.out_pixels() / 3, outputs = s.group_outputs();
    Scratch scratch(kernel.rows_scratch_bytes(s, p.t, s.out_pixels() - middle));
    for (int64_t group = 0; group < s.groups; ++group) {
      const int64_t first = group * outputs / kPanel, last = ceil_div((group + 1) * outputs, kPanel);
      const int64_t split = first + (last - first) / 2;
      for (const auto& [pixel, pixel_end] : {std::pair{int64_t{0}, middle}, std::pair{middle, s.out_pixels()}}) {
        for (const auto& [panel, panel_end] : {std::pair{first, split}, std::pair{split, last}}) {
          kernel.multiply_rows(s, p.weight(), x, to, n, group, pixel, pixel_end, panel, panel_end, p.bias_or_null(),
                               scratch.get());
        }
      }
    }
  }
}

template <class T>
void check_equal(const std::vector<T>& got, const std::vector<T>& expected, const char* what, const char* level,
                 const Case& c) {
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(std::memcmp(&got[i], &expected[i], sizeof(T)) == 0, "%s, %s: %s at %zu is %g, not %g", level,
          name_of(c).c_str(), what, i, static_cast<double>(got[i]), static_cast<double>(expected[i]));
  }
}

float activated(float y, const ConvResults& to) {
  const float gate = std::min(std::max(y + 3.0f, 0.0f), 6.0f);
  switch (to.activation) {
    case Activation::kNone:
      return y;
    case Activation::kClamp:
      return std::min(std::max(y, to.low), to.high);
    case Activation::kLeakyRelu:
      return y > 0.0f ? y : y * to.low;
    case Activation::kHardswish:
      return y * gate / 6.0f;
    case Activation::kHardsigmoid:
      return gate / 6.0f;
  }
  return kNaN;
}

// Float addend, activation, and both results at once, the codes inside wider pixels.
void check_activations(const Problem& p, const ConvKernels& kernel, bool depthwise,
                       const std::vector<float>& products) {
  const int64_t stride = p.c.outputs + 5;
  const size_t pixels = products.size() / size(p.c.outputs);
  std::vector<float> added(products.size());
  for (float& value : added) value = random_float();
  for (int kind = 0; kind <= static_cast<int>(Activation::kHardsigmoid); ++kind) {
    std::vector<float> floats(products.size(), -1.0f), expected_floats;
    std::vector<int8_t> codes(pixels * size(stride), 99), expected_codes(codes);
    ConvResults to = {floats.data(), codes.data() + 3, nullptr, p.requantization, p.c.outputs, stride};
    to.added = added.data(), to.activation = static_cast<Activation>(kind);
    to.low = to.activation == Activation::kClamp ? -0.5f : 0.1f, to.high = 0.75f;
    multiply(p, kernel, depthwise, to);
    for (size_t i = 0; i < products.size(); ++i) {
      expected_floats.push_back(activated(products[i] + added[i], to));
      expected_codes[i / size(p.c.outputs) * size(stride) + 3 + i % size(p.c.outputs)] =
          quantized(expected_floats.back(), p.requantization);
    }
    check_equal(floats, expected_floats, "activated float", level, p.c);
    check_equal(codes, expected_codes, "activated code", level, p.c);
  }
}

int64_t cases = 0;

void check_case(const Case& c) {
  const Problem p(c);
  const Result expected = reference(p);
  const size_t results = expected.floats.size();
  for (const std::string& name : supported_levels()) {
    set_active_level(name);
    level = name.c_str();
    const ConvKernels& kernel = kernels().conv;
    for (bool depthwise : {false, true}) {
      if (depthwise && !kernel.is_depthwise(p.s, p.weight())) continue;
      Result got = {std::vector<float>(results, -1.0f), std::vector<int8_t>(results, -1), std::vector<int8_t>(results)};
      ConvResults to = {got.floats.data(), nullptr, nullptr, p.requantization, c.outputs, c.outputs};
      multiply(p, kernel, depthwise, to);
      to.floats = nullptr, to.codes = got.codes.data();
      multiply(p, kernel, depthwise, to);
      to.codes = got.with_residual.data(), to.residual = p.residual.data();
      multiply(p, kernel, depthwise, to);
      check_equal(got.floats, expected.floats, "float result", level, c);
      check_equal(got.codes, expected.codes, "code", level, c);
      check_equal(got.with_residual, expected.with_residual, "code with a residual", level, c);
      check_activations(p, kernel, depthwise, expected.floats);
      ++cases;
    }
  }
}

void check_layouts() {
  for (int64_t channels : {1, 3, 16, 17, 40}) {
    for (int64_t pixels : {1, 15, 33}) {
      std::vector<float> first(size(channels * pixels)), last(first.size()), turned(first.size());
      for (float& value : first) value = random_float() * 100;
      first[0] = kNaN, first.back() = -kInf;
      float largest = 0;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < pixels; ++p) {
          const float value = first[size(c * pixels + p)];
          last[size(p * channels + c)] = value;
          if (std::fabs(value) > largest) largest = std::fabs(value);
        }
      }
      std::vector<int8_t> expected;
      for (float value : last) {
        const float scaled = value == value ? value * (1.0f / 0.5f) : 0.0f;
        expected.push_back(static_cast<int8_t>(std::nearbyint(std::clamp(scaled, -127.0f - 5, 127.0f - 5)) + 5));
      }
      for (const std::string& name : supported_levels()) {
        set_active_level(name);
        level = name.c_str();
        const ConvKernels& kernel = kernels().conv;
        CHECK(kernel.largest_magnitude(first.data(), FloatType::kFloat32, channels * pixels) == largest, "%s", level);
        for (bool channels_first : {false, true}) {
          std::vector<int8_t> codes(expected.size(), 99);
          const int64_t middle = pixels > 16 ? 16 : 0;
          const float* x = channels_first ? first.data() : last.data();
          kernel.quantize_pixels(x, FloatType::kFloat32, channels_first, channels, pixels, 0, middle, 0.5f, 5, -127,
                                 codes.data());
          kernel.quantize_pixels(x, FloatType::kFloat32, channels_first, channels, pixels, middle, pixels, 0.5f, 5,
                                 -127, codes.data());
          CHECK(codes == expected, "%s: codes of %d channels, %d pixels", level, int(channels), int(pixels));
        }
        kernel.to_channels_first(last.data(), channels, pixels, 0, pixels, turned.data());
        CHECK(std::memcmp(turned.data(), first.data(), first.size() * sizeof(float)) == 0, "%s", level);
      }
    }
  }
}

}  // namespace

int main() {
  check_layouts();
  const Case square = {32, 40, 1, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}};
  for (int bits = 1; bits <= 8; ++bits) {
    for (bool zero_points : {false, true}) {
      for (int32_t act_zero_point : {0, -128, 127}) {
        Case c = square;
        c.bits = bits, c.zero_points = zero_points, c.act_zero_point = act_zero_point, c.bias = bits % 2 == 0;
        check_case(c);  // in place
        c.channels = 10, c.outputs = 20, c.groups = 2;
        check_case(c);  // gathered, panels that groups share
        c.channels = c.outputs = c.groups = 72;
        check_case(c);  // depthwise
      }
    }
  }
  for (int64_t outputs : {1, 16, 24, 33, 64, 80, 130}) {  // tiles of 1 to 4 panels, partial ones
    Case c = square;
    c.outputs = outputs, c.act_zero_point = 3;
    check_case(c);
  }
  for (int64_t columns = 1; columns <= 27; ++columns) {  // tiles of rows
    for (int64_t outputs : {16, 32, 48, 64}) {
      check_case({8, outputs, 1, {1, 1, columns}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}});
    }
  }
  for (int64_t channels : {4, 3, 12}) {
    for (int64_t stride : {1, 2, 3}) {
      for (int64_t dilation : {1, 2}) {
        for (int64_t padding : {0, 1, 4}) {
          for (bool transposed : {false, true}) {
            Case c = {channels,         18,         1, {1, 6, 8}, {1, 3, 2}, {1, stride, 2}, {0, padding, 1},
                      {1, 1, dilation}, transposed, 8, false,     true,      false,          -9};
            if (transposed && padding == 4) c.padding[1] = 1;
            check_case(c);
          }
        }
      }
    }
  }
  check_case({4, 6, 2, {3, 4, 5}, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {1, 1, 2}});
  check_case({4, 6, 2, {3, 4, 5}, {2, 3, 2}, {2, 2, 1}, {1, 0, 1}, {1, 1, 2}, true});
  for (int64_t channels : {8, 16, 63, 64, 65, 144}) {
    for (int64_t kernel : {1, 3, 4, 5, 7}) {
      for (int64_t stride : {1, 2}) {
        check_case({channels,
                    channels,
                    channels,
                    {1, 6, 9},
                    {1, kernel, kernel},
                    {1, stride, stride},
                    {0, kernel / 2, kernel / 2},
                    {1, 1, 1},
                    false,
                    8,
                    false,
                    true,
                    false,
                    11});
      }
    }
  }
  check_case({20, 20, 20, {1, 9, 9}, {1, 3, 2}, {1, 1, 3}, {0, 2, 0}, {1, 3, 2}});
  check_case({20, 20, 20, {1, 1, 19}, {1, 1, 5}, {1, 1, 2}, {0, 0, 3}, {1, 1, 1}});
  check_case({20, 40, 20, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}});  // two outputs a channel
  for (int32_t act_zero_point : {0, 127}) {                                         // the largest sums
    check_case({3276,
                2,
                1,
                {1, 3, 3},
                {1, 3, 3},
                {1, 1, 1},
                {0, 0, 0},
                {1, 1, 1},
                false,
                8,
                false,
                true,
                true,
                act_zero_point});
    check_case({64,
                64,
                64,
                {1, 7, 7},
                {1, 7, 7},
                {1, 1, 1},
                {0, 0, 0},
                {1, 1, 1},
                false,
                8,
                false,
                true,
                true,
                act_zero_point});
  }
  std::printf("conv: %d cases are bit for bit those of plain loops\n", int(cases));
}
