// run_program: the steps between two float parts of a lowered model, one after another in one call, so that a layer
// costs its arithmetic and nothing else. halfbyte/lowering/program.py writes programs and is where each field has its
// name.
//
// All sizes are those of one sample. Values live in an arena, each at `at` * batch bytes from its beginning; results in
// tensors of their own. Every place is checked against the memory behind it: a damaged program must not write past it.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "conv_products.h"
#include "halfbyte/pool.h"
#include "local_buffer.h"
#include "product_operands.h"

namespace halfbyte::ops {
namespace {

enum class Step : int64_t { kQuantize, kImport, kConv, kFinish, kMaxPool, kAveragePool, kCopy, kTurn };

// Where a value is: nowhere, in the arena, or one of the results.
enum class Space : int64_t { kNowhere = -1, kArena = 0, kOutput = 1 };

class Program {
 public:
  Program(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Tensor& steps,
          const Tensor& numbers, int64_t arena, const std::vector<int64_t>& outputs)
      : inputs_(inputs), constants_(constants), arena_bytes_(arena) {
    check(!inputs.empty() && inputs[0].dim() >= 1, "a program needs an input with a batch dimension");
    check(arena >= 0 && arena < (int64_t{1} << 40), "a program has an arena of ", arena, " bytes");
    batch_ = inputs[0].size(0);
    for (const Tensor& input : inputs) {
      check_type(input, ScalarType::Float, "an input");
      check(input.dim() >= 1 && input.size(0) == batch_, "inputs have different batch sizes");
    }
    check_type(steps, ScalarType::Long, "steps");
    check_type(numbers, ScalarType::Float, "numbers");
    check(steps.dim() == 1 && steps.is_contiguous() && numbers.dim() == 1 && numbers.is_contiguous(),
          "steps and numbers must be contiguous vectors");
    step_ = static_cast<const int64_t*>(steps.const_data_ptr()), step_end_ = step_ + steps.numel();
    number_ = static_cast<const float*>(numbers.const_data_ptr()), number_end_ = number_ + numbers.numel();
    allocate_outputs(outputs);
  }

  std::vector<Tensor> run() {
    if (batch_ == 0) return results_;
    // Kept from call to call up to some size: pages that are fresh from the system cost more than the steps that use
    // them.
    constexpr int64_t kKeptArena = 64 << 20;
    thread_local LocalBuffer kept;
    LocalBuffer large;
    const int64_t bytes = batch_ * arena_bytes_ + 64;
    arena_ = (bytes <= kKeptArena ? kept : large).get(bytes);
    while (step_ < step_end_) {
      switch (static_cast<Step>(next())) {
        case Step::kQuantize:
          quantize();
          break;
        case Step::kImport:
          import();
          break;
        case Step::kConv:
          convolve();
          break;
        case Step::kFinish:
          finish();
          break;
        case Step::kMaxPool:
          pool(false);
          break;
        case Step::kAveragePool:
          pool(true);
          break;
        case Step::kCopy:
          copy();
          break;
        case Step::kTurn:
          turn();
          break;
        default:
          check(false, "a program has an unknown step");
      }
    }
    call_buffer().release_if_large();
    return results_;
  }

 private:
  // Small enough that the bytes of an image, pixels * channels * 4, do not overflow.
  static int64_t check_size(int64_t size) {
    check(size >= 0 && size < (int64_t{1} << 28), "a program has the size ", size);
    return size;
  }
  int64_t next() {
    check(step_ < step_end_, "a program ends inside a step");
    return *step_++;
  }
  int64_t next_size() { return check_size(next()); }
  float next_number() {
    check(number_ < number_end_, "a program has too few numbers");
    return *number_++;
  }
  const Tensor& next_constant() {
    const int64_t index = next();
    check(index >= 0 && index < static_cast<int64_t>(constants_.size()), "a program has no constant ", index);
    return constants_[static_cast<size_t>(index)];
  }
  OptionalTensor next_optional() {
    OptionalTensor tensor;
    check(step_ < step_end_, "a program ends inside a step");
    if (*step_ >= 0) {
      tensor.emplace(next_constant());
    } else {
      next();
    }
    return tensor;
  }
  const Tensor& next_input(int64_t count) {
    const int64_t index = next();
    check(index >= 0 && index < static_cast<int64_t>(inputs_.size()), "a program has no input ", index);
    const Tensor& input = inputs_[static_cast<size_t>(index)];
    check(input.numel() == batch_ * count, "an input has ", input.numel(), " elements; the program was made for ",
          count, " a sample");
    return input;
  }

  // Memory of `bytes` a sample, of which the first `shift` are skipped; null is nowhere.
  template <class T>
  T* next_place(int64_t bytes, int64_t shift = 0) {
    const auto space = static_cast<Space>(next());
    const int64_t at = next();
    if (space == Space::kNowhere) return nullptr;
    check(bytes >= 0 && shift >= 0, "a program has a negative size");
    if (space == Space::kOutput) {
      check(at >= 0 && at < static_cast<int64_t>(memory_.size()), "a program has no result ", at);
      const Output& output = memory_[static_cast<size_t>(at)];
      check(sizeof(T) == sizeof(float) && shift == 0 && bytes <= output.bytes, "a result is too small");
      return static_cast<T*>(output.data);
    }
    check(space == Space::kArena && at >= 0 && at % 64 == 0 && at <= arena_bytes_ && bytes <= arena_bytes_ - at,
          "a program reaches past its arena");
    return reinterpret_cast<T*>(arena_ + at * batch_ + shift);
  }
  template <class T>
  T* next_present(int64_t bytes, int64_t shift = 0) {
    T* place = next_place<T>(bytes, shift);
    check(place != nullptr, "a step of a program has no operand");
    return place;
  }

  void next_sizes(int64_t (&to)[3]) {
    for (int64_t& size : to) size = next_size();
  }
  static int64_t product(const int64_t (&sizes)[3]) {
    int64_t pixels = 1;
    for (int64_t size : sizes) {
      check(size <= (int64_t{1} << 31) / std::max<int64_t>(pixels, 1), "a sample has more than 2^31 pixels");
      pixels *= size;
    }
    return pixels;
  }

  void allocate_outputs(const std::vector<int64_t>& outputs) {
    for (size_t i = 0; i < outputs.size();) {
      check(i + 2 <= outputs.size(), "outputs end early");
      const bool channels_last = outputs[i] != 0;
      const auto dims = static_cast<size_t>(outputs[i + 1]);
      i += 2;
      check(dims < 8 && i + dims <= outputs.size() && (!channels_last || dims >= 2), "outputs end early");
      std::vector<int64_t> sizes = {batch_};
      for (size_t d = 0; d < dims; ++d) sizes.push_back(check_size(outputs[i + d]));
      i += dims;
      if (channels_last) std::rotate(sizes.begin() + 1, sizes.begin() + 2, sizes.end());
      Tensor result = new_tensor(sizes, ScalarType::Float);
      memory_.push_back({result.mutable_data_ptr(), batch_ == 0 ? 0 : result.numel() / batch_ * 4});
      if (channels_last) {
        for (auto d = static_cast<int64_t>(dims); d > 1; --d) result = torch::stable::transpose(result, d, d - 1);
      }
      results_.push_back(std::move(result));
    }
  }

  // The data of an input as [pixels, channels] or, `first`, as [channels, pixels].
  struct Floats {
    Tensor tensor;
    bool first;
    const float* data() const { return static_cast<const float*>(tensor.const_data_ptr()); }
  };
  static Floats floats_of(const Tensor& x, bool rows) {
    if (!rows && !x.is_contiguous() && is_channels_last(x)) return {x, false};
    return {as_contiguous(x), !rows};
  }

  void quantize() {
    const bool rows = next() != 0;
    const int64_t channels = next_size(), pixels = next_size();
    const Floats x = floats_of(next_input(channels * pixels), rows);
    auto* codes = next_present<int8_t>(channels * pixels);
    const auto zero_point = static_cast<int32_t>(next());
    const float scale = next_number();
    check(zero_point >= -128 && zero_point <= 127, "a program has the zero point ", zero_point);
    over_pixels(channels, pixels, 16, [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t at = n * channels * pixels;
      kernels().conv.quantize_pixels(x.data() + at, FloatType::kFloat32, x.first, channels, pixels, begin, end, scale,
                                     zero_point, -128, codes + at);
    });
  }

  // Floats as they lie in memory: channels last, or (rows) contiguous.
  void import() {
    const bool rows = next() != 0;
    const int64_t channels = next_size(), pixels = next_size();
    const Floats x = floats_of(next_input(channels * pixels), rows);
    auto* to = next_present<float>(4 * channels * pixels);
    over_pixels(channels, pixels, 16, [&](int64_t n, int64_t begin, int64_t end) {
      const float* from = x.data() + n * channels * pixels;
      float* part = to + n * channels * pixels;
      if (!x.first) {
        std::copy(from + begin * channels, from + end * channels, part + begin * channels);
        return;
      }
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t c = 0; c < channels; ++c) part[p * channels + c] = from[c * pixels + p];
      }
    });
  }

  ConvResults next_results(int64_t channels, int64_t pixels) {
    ConvResults to = {};
    to.channels = channels, to.code_stride = next_size();
    const int64_t shift = next_size();
    check(channels + shift <= to.code_stride, "codes of ", channels, " channels do not fit into ", to.code_stride);
    to.codes = next_place<int8_t>(pixels * to.code_stride, shift);
    to.floats = next_place<float>(4 * pixels * channels);
    to.added = next_place<float>(4 * pixels * channels);
    to.requantization = {.inverse_scale = 1.0f / next_number(),
                         .zero_point = static_cast<int32_t>(next()),
                         .lowest = 0,
                         .highest = 0,
                         .residual_scale = 1.0f,
                         .residual_zero_point = 0};
    to.requantization.lowest = static_cast<int32_t>(next()), to.requantization.highest = static_cast<int32_t>(next());
    const int64_t activation = next();
    check(activation >= 0 && activation <= static_cast<int64_t>(Activation::kHardsigmoid), "unknown activation");
    to.activation = static_cast<Activation>(activation);
    to.low = next_number(), to.high = next_number();
    return to;
  }

  void convolve() {
    ConvShape s = {};
    s.batch = batch_, s.in_channels = next_size(), s.out_channels = next_size(), s.groups = next_size();
    next_sizes(s.in), next_sizes(s.out), next_sizes(s.kernel);
    next_sizes(s.stride), next_sizes(s.padding), next_sizes(s.dilation);
    s.transposed = next() != 0;
    check(s.groups >= 1 && s.in_channels % s.groups == 0 && s.out_channels % s.groups == 0 && s.stride[0] >= 1 &&
              s.stride[1] >= 1 && s.stride[2] >= 1,
          "a program has a convolution that does not fit together");
    const int64_t in_pixels = product(s.in), out_pixels = product(s.out);
    product(s.kernel);
    const auto* x = next_present<int8_t>(in_pixels * s.in_channels);
    const float act_scale = next_number();
    const auto act_zero_point = static_cast<int32_t>(next());
    check(act_zero_point >= -128 && act_zero_point <= 127, "a program has the zero point ", act_zero_point);
    const int64_t bits = next(), group_size = next_size();
    check(bits >= 1 && bits <= 8 && group_size >= 1 && s.row_inputs() % group_size == 0, "weights do not fit");
    const TileShape shape = {.out_features = s.out_channels,
                             .in_features = s.row_inputs(),
                             .group_size = group_size,
                             .bits = static_cast<int>(bits)};
    const Tensor &qweight = next_constant(), &scale = next_constant();
    const OptionalTensor zero_point = next_optional(), bias = next_optional();
    const WeightOperand operand = checked_weight(shape, qweight, scale, zero_point, bias);
    const FloatBias float_bias(operand.bias);
    const ConvResults to = next_results(s.out_channels, out_pixels);
    if (to.codes == nullptr && to.floats == nullptr) return;
    if (is_matrix_product(s)) {  // samples are rows like any other
      s.in[2] = s.out[2] = in_pixels * batch_;
      s.in[0] = s.in[1] = s.out[0] = s.out[1] = s.batch = 1;
      product(s.in);
    }
    Parts parts;
    const int64_t sums_at =
        parts.add<int32_t>(needs_pixel_sums(s, operand.weight) ? s.batch * s.in_pixels() * s.groups : 0);
    const int64_t scales_at = parts.add<float>(s.batch);
    std::byte* memory = call_buffer().get(parts.bytes());
    auto* scales = reinterpret_cast<float*>(memory + scales_at);
    std::fill_n(scales, s.batch, act_scale);
    multiply_conv(s, operand.weight, {x, scales, act_zero_point, nullptr}, float_bias.get(), to,
                  reinterpret_cast<int32_t*>(memory + sums_at));
  }

  static bool is_matrix_product(const ConvShape& s) {
    bool ones = s.groups == 1 && !s.transposed;
    for (int d = 0; d < 3; ++d) {
      ones = ones && s.kernel[d] == 1 && s.stride[d] == 1 && s.padding[d] == 0 && s.in[d] == s.out[d];
    }
    return ones;
  }

  void finish() {
    const int64_t channels = next_size(), pixels = next_size();
    const auto* x = next_present<float>(4 * channels * pixels);
    const ConvResults to = next_results(channels, pixels);
    over_pixels(channels, batch_ * pixels, 1, 1, [&](int64_t, int64_t begin, int64_t end) {
      kernels().conv.finish(x + begin * channels, begin, end, to);
    });
  }

  void pool(bool average) {
    const bool floats = average || next() != 0;
    ConvShape s = {};
    s.in_channels = s.out_channels = next_size();
    s.batch = batch_;
    next_sizes(s.in), next_sizes(s.out), next_sizes(s.kernel);
    next_sizes(s.stride), next_sizes(s.padding), next_sizes(s.dilation);
    const int64_t channels = s.in_channels, size = floats ? 4 : 1;
    const int64_t in = product(s.in) * channels, pixels = product(s.out), out = pixels * channels;
    if (!floats) {
      const auto* x = next_present<int8_t>(in);
      auto* y = next_present<int8_t>(out);
      over_pixels(channels * product(s.kernel), pixels, 1, [&](int64_t n, int64_t begin, int64_t end) {
        kernels().pool.max_codes(s, x + n * in, begin, end, y + n * out);
      });
      return;
    }
    const auto* x = next_present<float>(in * size);
    auto* y = next_present<float>(out * size);
    const float* divisor = average ? next_vector<float>(ScalarType::Float, pixels) : nullptr;
    over_pixels(channels * product(s.kernel), pixels, 1, [&](int64_t n, int64_t begin, int64_t end) {
      if (average) {
        kernels().pool.average(s, x + n * in, divisor, begin, end, y + n * out);
      } else {
        kernels().pool.max_floats(s, x + n * in, begin, end, y + n * out);
      }
    });
  }

  template <class T>
  const T* next_vector(ScalarType type, int64_t count) {
    const Tensor& tensor = next_constant();
    check_type(tensor, type, "a table of a program");
    check(tensor.is_contiguous() && tensor.numel() == count, "a table of a program has ", tensor.numel(),
          " entries, not ", count);
    return static_cast<const T*>(tensor.const_data_ptr());
  }

  void copy() {
    CopyShape s = {};
    next_sizes(s.in), next_sizes(s.out);
    const int64_t in_pixels = product(s.in), pixels = product(s.out);
    const auto* source = next_vector<int32_t>(ScalarType::Int, s.out[0] + s.out[1] + s.out[2]);
    for (int d = 0; d < 3; ++d) {
      s.source[d] = source;
      for (int64_t i = 0; i < s.out[d]; ++i) check(source[i] < s.in[d], "a copy reads past its input");
      source += s.out[d];
    }
    s.in_stride = next_size(), s.out_stride = next_size(), s.bytes = next_size();
    const int64_t in_shift = next_size(), out_shift = next_size(), fill = next();
    check(in_shift + s.bytes <= s.in_stride && out_shift + s.bytes <= s.out_stride, "a copy reaches past its pixels");
    const auto* x = next_present<std::byte>(in_pixels * s.in_stride, in_shift);
    auto* y = next_present<std::byte>(pixels * s.out_stride, out_shift);
    const std::vector<std::byte> filled(static_cast<size_t>(s.bytes), static_cast<std::byte>(fill & 255));
    s.fill = filled.data();
    over_pixels(s.bytes, pixels, 1, [&](int64_t n, int64_t begin, int64_t end) {
      kernels().pool.copy_pixels(s, x + n * in_pixels * s.in_stride, begin, end, y + n * pixels * s.out_stride);
    });
  }

  // [pixels, channels] to [channels, pixels].
  void turn() {
    const bool floats = next() != 0;
    const int64_t channels = next_size(), pixels = next_size(), count = channels * pixels;
    if (!floats) {
      const auto* x = next_present<int8_t>(count);
      auto* y = next_present<int8_t>(count);
      over_pixels(channels, pixels, 16, [&](int64_t n, int64_t begin, int64_t end) {
        kernels().pool.codes_to_channels_first(x + n * count, channels, pixels, begin, end, y + n * count);
      });
      return;
    }
    const auto* x = next_present<float>(4 * count);
    auto* y = next_present<float>(4 * count);
    over_pixels(channels, pixels, 16, [&](int64_t n, int64_t begin, int64_t end) {
      kernels().conv.to_channels_first(x + n * count, channels, pixels, begin, end, y + n * count);
    });
  }

  // f(sample, begin, end) over runs of pixels of all samples, in parallel; runs begin at multiples of `step`.
  template <class F>
  void over_pixels(int64_t work, int64_t pixels, int64_t step, const F& f) const {
    over_pixels(work, pixels, step, batch_, f);
  }
  template <class F>
  static void over_pixels(int64_t work, int64_t pixels, int64_t step, int64_t samples, const F& f) {
    const int64_t run = round_up(std::max<int64_t>(kElementGrain / std::max<int64_t>(work, 1), 1), step);
    const int64_t runs = ceil_div(pixels, run);
    parallel_for(samples * runs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % runs * run;
        f(task / runs, first, std::min(first + run, pixels));
      }
    });
  }

  struct Output {
    void* data;
    int64_t bytes;  // of a sample
  };

  const std::vector<Tensor>&inputs_, &constants_;
  int64_t batch_ = 0, arena_bytes_;
  std::byte* arena_ = nullptr;
  const int64_t *step_ = nullptr, *step_end_ = nullptr;
  const float *number_ = nullptr, *number_end_ = nullptr;
  std::vector<Output> memory_;
  std::vector<Tensor> results_;
};

}  // namespace

std::vector<Tensor> run_program(std::vector<Tensor> inputs, std::vector<Tensor> constants, Tensor steps, Tensor numbers,
                                int64_t arena, std::vector<int64_t> outputs) {
  return Program(inputs, constants, steps, numbers, arena, outputs).run();
}

}  // namespace halfbyte::ops
