// Loops over neighbouring channels, which compilers turn into vectors of the level. Bound by memory.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "halfbyte/pool.h"

namespace halfbyte {
namespace {

// f(pixel of the input) for every tap of the window of an output pixel that lies inside.
template <class F>
inline void for_window(const ConvShape& s, int64_t pixel, const F& f) {
  const int64_t o[3] = {pixel / s.out[2] / s.out[1], pixel / s.out[2] % s.out[1], pixel % s.out[2]};
  for (int64_t kz = 0; kz < s.kernel[0]; ++kz) {
    const int64_t z = o[0] * s.stride[0] - s.padding[0] + kz * s.dilation[0];
    if (z < 0 || z >= s.in[0]) continue;
    for (int64_t ky = 0; ky < s.kernel[1]; ++ky) {
      const int64_t y = o[1] * s.stride[1] - s.padding[1] + ky * s.dilation[1];
      if (y < 0 || y >= s.in[1]) continue;
      for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
        const int64_t x = o[2] * s.stride[2] - s.padding[2] + kx * s.dilation[2];
        if (x >= 0 && x < s.in[2]) f((z * s.in[1] + y) * s.in[2] + x);
      }
    }
  }
}

template <class T>
void pool_max(const ConvShape& s, const T* x, int64_t begin, int64_t end, T* y) {
  constexpr T kLowest =
      std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();
  const int64_t channels = s.in_channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T* to = y + pixel * channels;
    std::fill_n(to, channels, kLowest);
    for_window(s, pixel, [&](int64_t at) {
      const T* from = x + at * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = from[c] > to[c] ? from[c] : to[c];
    });
  }
}

void pool_average(const ConvShape& s, const float* x, const float* divisor, int64_t begin, int64_t end, float* y) {
  const int64_t channels = s.in_channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    float* to = y + pixel * channels;
    std::fill_n(to, channels, 0.0f);
    for_window(s, pixel, [&](int64_t at) {
      const float* from = x + at * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
    });
    for (int64_t c = 0; c < channels; ++c) to[c] /= divisor[pixel];
  }
}

void copy_pixels(const CopyShape& s, const void* x, int64_t begin, int64_t end, void* y) {
  const auto* from = static_cast<const std::byte*>(x);
  auto* to = static_cast<std::byte*>(y);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t iz = s.source[0][pixel / s.out[2] / s.out[1]], iy = s.source[1][pixel / s.out[2] % s.out[1]];
    const int64_t ix = s.source[2][pixel % s.out[2]];
    const bool outside = iz < 0 || iy < 0 || ix < 0;
    const void* source = outside ? s.fill : from + ((iz * s.in[1] + iy) * s.in[2] + ix) * s.in_stride;
    std::memcpy(to + pixel * s.out_stride, source, static_cast<size_t>(s.bytes));
  }
}

void codes_to_channels_first(const int8_t* x, int64_t channels, int64_t pixels, int64_t begin, int64_t end, int8_t* y) {
  for (int64_t pixel = begin; pixel < end; pixel += 64) {
    const int64_t pixel_end = std::min(pixel + 64, end);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = pixel; p < pixel_end; ++p) y[c * pixels + p] = x[p * channels + c];
    }
  }
}

}  // namespace
}  // namespace halfbyte
