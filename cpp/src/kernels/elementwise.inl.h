// Elementwise kernels over sixteen lanes (xsimd_arch.h). All are bound by memory: at 16 lanes each costs 8 to 12 vector
// operations for 64 to 192 bytes moved. The same operations run in the same order on every level.
#pragma once
#include "load_store.inl.h"
#include "minmax.inl.h"
#include "search.inl.h"

namespace halfbyte {
namespace {
namespace elementwise {

// Writes bits one after another into bytes, sixteen at a time once that many are there.
class BitWriter {
 public:
  static constexpr bool kNeeded = true;
  explicit BitWriter(uint8_t* bytes) : bytes_(bytes) {}
  void put(uint32_t bits, int64_t count) {
    pending_ |= bits << filled_;
    filled_ += count;
    if (filled_ >= 16) {
      flush(2);
      pending_ >>= 16;
      filled_ -= 16;
    }
  }
  // Sixty-four bits at once, where none are pending.
  bool can_put_words() const { return filled_ == 0; }
  void put_word(uint64_t bits) {
    std::memcpy(bytes_, &bits, sizeof(bits));
    bytes_ += sizeof(bits);
  }
  void finish() { flush((filled_ + 7) / 8); }

 private:
  void flush(int64_t count) {
    for (int64_t i = 0; i < count; ++i) *bytes_++ = static_cast<uint8_t>(pending_ >> (8 * i));
  }
  uint8_t* bytes_;
  uint32_t pending_ = 0;  // at most 15 + 16 bits
  int64_t filled_ = 0;
};

struct NoBits {
  static constexpr bool kNeeded = false;
  void put(uint32_t, int64_t) {}
  bool can_put_words() const { return false; }
  void put_word(uint64_t) {}
  void finish() {}
};

// The qparams of sixteen neighbouring elements. Codes are counted from the zero point.
struct Affine {
  Lanes scale, inverse_scale, zero_point, lowest, highest;
};

// Calls f(begin, end, affine_at) for stretches of [begin, end); affine_at(i) holds the qparams of the sixteen elements
// at begin + i of the stretch.
template <class F>
inline void for_each_stretch(const AffineGrid& grid, int64_t begin, int64_t end, F f) {
  const Lanes qmin = broadcast(static_cast<float>(grid.qmin)), qmax = broadcast(static_cast<float>(grid.qmax));
  if (grid.inverse_scale != nullptr) {
    // The channel of an element advances with it; a stretch ends where the channels begin anew.
    int64_t channel = begin % grid.channels;
    while (begin < end) {
      // Vectors that begin inside the row may end past it: the arrays repeat themselves there.
      const int64_t stretch_end = std::min(end, begin + round_up(grid.channels - channel, kLanes));
      f(begin, stretch_end, [&](int64_t i) {
        const int64_t at = channel + i;
        const Lanes zero_point = load(grid.zero_point + at);
        return Affine{load(grid.scale + at), load(grid.inverse_scale + at), zero_point, qmin - zero_point,
                      qmax - zero_point};
      });
      channel = (channel + stretch_end - begin) % grid.channels;
      begin = stretch_end;
    }
    return;
  }
  int64_t run = begin / grid.run_length;
  int64_t channel = run % grid.channels;
  while (begin < end) {
    const int64_t run_end = std::min(end, (run + 1) * grid.run_length);
    const Lanes zero_point = broadcast(static_cast<float>(grid.zero_point[channel]));
    const Affine affine = {broadcast(grid.scale[channel]), broadcast(1.f / grid.scale[channel]), zero_point,
                           qmin - zero_point, qmax - zero_point};
    f(begin, run_end, [&](int64_t) -> const Affine& { return affine; });
    begin = run_end;
    ++run;
    if (++channel == grid.channels) channel = 0;
  }
}

template <FloatType Type, class Mask>
void fake_quantize_range(const Element<Type>* x, Element<Type>* y, Mask mask, const AffineGrid& grid, int64_t begin,
                         int64_t end) {
  [[maybe_unused]] const Lanes one = broadcast(1.f);
  for_each_stretch(grid, begin, end, [&](int64_t from, int64_t to, auto affine_at) {
    const auto step = [&](const Lanes& value, int64_t i, uint32_t& inside) {
      const Affine& affine = affine_at(i);
      const Lanes scaled = value * affine.inverse_scale;
      if constexpr (!Mask::kNeeded) {
        inside = 0;
        return round_small(clamp(scaled, affine.lowest, affine.highest)) * affine.scale;
      } else {
        // Clamped to one past either end before rounding: small enough to round by addition, and what lies outside
        // still does afterwards, so that the second clamp tells the mask.
        const Lanes rounded = round_small(clamp(scaled, affine.lowest - one, affine.highest + one));
        const Lanes code = clamp(rounded, affine.lowest, affine.highest);
        inside = equal_bits(code, rounded);
        return code * affine.scale;
      }
    };
    int64_t i = 0;
    // A store of mask bytes may alias anything, so the fewer of them, the less the compiler loads anew.
    for (; mask.can_put_words() && i + 4 * kLanes <= to - from; i += 4 * kLanes) {
      uint64_t word = 0;
      for (int64_t part = 0; part < 4; ++part) {
        uint32_t inside;
        const int64_t at = i + part * kLanes;
        store_floats<Type>(y + from + at, step(load_floats<Type>(x + from + at), at, inside));
        word |= static_cast<uint64_t>(inside) << (part * kLanes);
      }
      mask.put_word(word);
    }
    transform(x + from + i, y + from + i, to - from - i, load_floats<Type>, store_floats<Type>,
              [&](const Lanes& value, int64_t at, int64_t count) {
                uint32_t inside;
                const Lanes quantized = step(value, i + at, inside);
                mask.put(inside & ((1u << count) - 1u), count);
                return quantized;
              });
  });
  mask.finish();
}

template <FloatType Type>
void fake_quantize(const void* x, void* y, uint8_t* mask, const AffineGrid& grid, int64_t begin, int64_t end) {
  const auto* in = static_cast<const Element<Type>*>(x);
  auto* out = static_cast<Element<Type>*>(y);
  if (mask == nullptr) {
    fake_quantize_range<Type>(in, out, NoBits(), grid, begin, end);
  } else {
    fake_quantize_range<Type>(in, out, BitWriter(mask + begin / 8), grid, begin, end);
  }
}

template <FloatType Type>
void mask_gradient(const void* grad_out, const uint8_t* mask, void* grad_in, int64_t begin, int64_t end) {
  const uint8_t* bytes = mask + begin / 8;
  transform(static_cast<const Element<Type>*>(grad_out) + begin, static_cast<Element<Type>*>(grad_in) + begin,
            end - begin, load_floats<Type>, store_floats<Type>, [&](const Lanes& grad, int64_t i, int64_t count) {
              const uint32_t high = count > 8 ? bytes[i / 8 + 1] : 0u;
              return keep(grad, bytes[i / 8] | high << 8);
            });
}

template <FloatType Type, class Code>
void quantize(const void* x, void* q, const AffineGrid& grid, int64_t begin, int64_t end) {
  const auto* in = static_cast<const Element<Type>*>(x);
  auto* out = static_cast<Code*>(q);
  const Lanes zero = broadcast(0.f);
  for_each_stretch(grid, begin, end, [&](int64_t from, int64_t to, auto affine_at) {
    const auto step = [&](const Lanes& value, int64_t i) {
      const Affine& affine = affine_at(i);
      const Lanes inside = clamp(value * affine.inverse_scale, affine.lowest, affine.highest);
      // NaN counts as 0, which is the zero point where the range holds it.
      const IntLanes nan = to_int(clamp(zero, affine.lowest, affine.highest));
      return round_to_int(inside, nan) + to_int(affine.zero_point);
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= to - from; i += 4 * kLanes) {
      IntLanes four[4];
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t at = i + part * kLanes;
        four[part] = step(load_floats<Type>(in + from + at), at);
      }
      store_codes(out + from + i, four);
    }
    transform(
        in + from + i, out + from + i, to - from - i, load_floats<Type>,
        [](Code* q, const IntLanes& codes) { store_codes(q, codes); },
        [&](const Lanes& value, int64_t at, int64_t) { return step(value, i + at); });
  });
}

template <FloatType Type, class Code>
void dequantize(const void* q, void* y, const AffineGrid& grid, int64_t begin, int64_t end) {
  const auto* in = static_cast<const Code*>(q);
  auto* out = static_cast<Element<Type>*>(y);
  for_each_stretch(grid, begin, end, [&](int64_t from, int64_t to, auto affine_at) {
    transform(in + from, out + from, to - from, load_codes<Code>, store_floats<Type>,
              [&](const Lanes& code, int64_t i, int64_t) {
                const Affine& affine = affine_at(i);
                return (code - affine.zero_point) * affine.scale;
              });
  });
}

template <FloatType Type>
void to_float(const void* x, float* y, int64_t count) {
  transform(static_cast<const Element<Type>*>(x), y, count, load_floats<Type>, store_floats<FloatType::kFloat32>,
            [](const Lanes& value, int64_t, int64_t) { return value; });
}

template <FloatType Type>
void from_float(const float* x, void* y, int64_t count) {
  transform(x, static_cast<Element<Type>*>(y), count, load_floats<FloatType::kFloat32>, store_floats<Type>,
            [](const Lanes& value, int64_t, int64_t) { return value; });
}

// Calls f with a FloatType as a compile-time constant.
template <class F>
inline void with_type(FloatType type, F f) {
  switch (type) {
    case FloatType::kFloat32:
      return f.template operator()<FloatType::kFloat32>();
    case FloatType::kBFloat16:
      return f.template operator()<FloatType::kBFloat16>();
    case FloatType::kFloat16:
      return f.template operator()<FloatType::kFloat16>();
  }
}

// Calls f with a FloatType and a code type as compile-time constants.
template <class F>
inline void with_types(FloatType type, CodeType code, F f) {
  with_type(type, [&]<FloatType Type>() {
    switch (code) {
      case CodeType::kInt8:
        return f.template operator()<Type, int8_t>();
      case CodeType::kUInt8:
        return f.template operator()<Type, uint8_t>();
      case CodeType::kInt32:
        return f.template operator()<Type, int32_t>();
    }
  });
}

}  // namespace elementwise

constexpr ElementwiseKernels elementwise_kernels() {
  namespace e = elementwise;
  return {
      .fake_quantize =
          [](const void* x, void* y, uint8_t* mask, FloatType type, const AffineGrid& grid, int64_t begin,
             int64_t end) {
            e::with_type(type, [&]<FloatType T>() { e::fake_quantize<T>(x, y, mask, grid, begin, end); });
          },
      .mask_gradient =
          [](const void* grad_out, const uint8_t* mask, void* grad_in, FloatType type, int64_t begin, int64_t end) {
            e::with_type(type, [&]<FloatType T>() { e::mask_gradient<T>(grad_out, mask, grad_in, begin, end); });
          },
      .quantize =
          [](const void* x, FloatType type, void* q, CodeType code, const AffineGrid& grid, int64_t begin,
             int64_t end) {
            e::with_types(type, code, [&]<FloatType T, class Code>() { e::quantize<T, Code>(x, q, grid, begin, end); });
          },
      .dequantize =
          [](const void* q, CodeType code, void* y, FloatType type, const AffineGrid& grid, int64_t begin,
             int64_t end) {
            e::with_types(type, code,
                          [&]<FloatType T, class Code>() { e::dequantize<T, Code>(q, y, grid, begin, end); });
          },
      .minmax_runs =
          [](const void* x, FloatType type, int64_t run_length, int64_t run_begin, int64_t run_end, float* lo,
             float* hi) {
            e::with_type(type, [&]<FloatType T>() { e::minmax_runs<T>(x, run_length, run_begin, run_end, lo, hi); });
          },
      .minmax_columns =
          [](const void* x, FloatType type, int64_t columns, int64_t row_begin, int64_t row_end, float* lo, float* hi) {
            e::with_type(type, [&]<FloatType T>() { e::minmax_columns<T>(x, columns, row_begin, row_end, lo, hi); });
          },
      .search_qparams = e::search_qparams,
      .to_float = [](const void* x, FloatType type, float* y,
                     int64_t count) { e::with_type(type, [&]<FloatType T>() { e::to_float<T>(x, y, count); }); },
      .from_float = [](const float* x, FloatType type, void* y,
                       int64_t count) { e::with_type(type, [&]<FloatType T>() { e::from_float<T>(x, y, count); }); },
  };
}

}  // namespace
}  // namespace halfbyte
