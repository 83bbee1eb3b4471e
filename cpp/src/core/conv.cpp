#include "halfbyte/conv.h"

namespace halfbyte {
namespace {

// The input that kernel position k of output o reads, or -1.
int64_t input_of(const ConvShape& s, int dim, int64_t o, int64_t k) {
  int64_t i;
  if (s.transposed) {
    const int64_t scaled = o + s.padding[dim] - k * s.dilation[dim];
    if (scaled < 0 || scaled % s.stride[dim] != 0) return -1;
    i = scaled / s.stride[dim];
  } else {
    i = o * s.stride[dim] - s.padding[dim] + k * s.dilation[dim];
  }
  return i >= 0 && i < s.in[dim] ? i : -1;
}

}  // namespace

void tap_pixels(const ConvShape& s, int64_t tap, int64_t begin, int64_t end, int32_t* pixels) {
  const int64_t kx = tap % s.kernel[2], ky = tap / s.kernel[2] % s.kernel[1], kz = tap / s.kernel[2] / s.kernel[1];
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t ox = pixel % s.out[2], oy = pixel / s.out[2] % s.out[1], oz = pixel / s.out[2] / s.out[1];
    const int64_t line_end = pixel - ox + s.out[2] < end ? pixel - ox + s.out[2] : end;
    const int64_t iz = input_of(s, 0, oz, kz), iy = input_of(s, 1, oy, ky);
    for (int64_t x = ox; pixel < line_end; ++pixel, ++x) {
      const int64_t ix = iz < 0 || iy < 0 ? -1 : input_of(s, 2, x, kx);
      *pixels++ = ix < 0 ? -1 : static_cast<int32_t>((iz * s.in[1] + iy) * s.in[2] + ix);
    }
  }
}

}  // namespace halfbyte
