#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "conv_layout.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const ConvKernels conv_table = {
    .largest_magnitude = conv_largest_magnitude,
    .quantize_pixels = quantize_pixels,
    .gather_rows = gather_rows,
    .requantize = requantize,
    .to_channels_first = to_channels_first,
};
}  // namespace halfbyte::HALFBYTE_LEVEL
