// Pooling and copying of channels-last tensors, int8 codes or float32: what stands between the convolutions of a
// lowered model. Maxima of codes are the codes of maxima, since rounding is monotonic.
#pragma once
#include "halfbyte/conv.h"

namespace halfbyte {

// Source of each index of a result along one dimension; -1 reads the fill value.
struct CopyShape {
  int64_t in[3], out[3];
  const int32_t* source[3];       // [out[d]]
  int64_t in_stride, out_stride;  // bytes from one pixel to the next
  int64_t bytes;                  // copied for each pixel
  const void* fill;               // [bytes]
};

struct PoolKernels {
  // Output pixels [begin, end) of one sample; the convolution's shape is that of the windows, in_channels of both
  // sides. Outside the input nothing counts. A maximum over nothing is the lowest code, or -inf.
  void (*max_codes)(const ConvShape& s, const int8_t* x, int64_t begin, int64_t end, int8_t* y);
  void (*max_floats)(const ConvShape& s, const float* x, int64_t begin, int64_t end, float* y);
  // Sums in the order of the window, as torch's avg_pool2d, divided by divisor[pixel].
  void (*average)(const ConvShape& s, const float* x, const float* divisor, int64_t begin, int64_t end, float* y);
  // Output pixels [begin, end) of one sample.
  void (*copy_pixels)(const CopyShape& s, const void* x, int64_t begin, int64_t end, void* y);
  // Pixels [begin, end) of codes [pixels, channels] as [channels, pixels].
  void (*codes_to_channels_first)(const int8_t* x, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
                                  int8_t* y);
};

}  // namespace halfbyte
