// The products of a convolution over channels-last codes, in parallel over samples and runs of output pixels.
#pragma once
#include "halfbyte/conv.h"
#include "halfbyte/dispatch.h"

namespace halfbyte::ops {

constexpr int64_t kElementGrain = 1 << 15;  // activations that a thread takes at least

// Whether multiply_conv wants memory for pixel sums: batch * in_pixels * groups integers.
bool needs_pixel_sums(const ConvShape& s, const TiledWeight& w);

// y of x; x.pixel_sum is not read. `pixel_sums` may be null where they are not needed.
void multiply_conv(const ConvShape& s, const TiledWeight& w, ConvInput x, const float* bias, const ConvResults& y,
                   int32_t* pixel_sums);

}  // namespace halfbyte::ops
