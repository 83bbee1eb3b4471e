#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "conv_depthwise.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const ConvKernels conv_table = {
    .largest_magnitude = conv_largest_magnitude,
    .quantize_pixels = quantize_pixels,
    .gather_rows = gather_rows,
    .finish = finish,
    .sum_pixels = sum_pixels,
    .reads_in_place = reads_in_place,
    .needs_pixel_sums = needs_pixel_sums,
    .multiply_rows = multiply_rows,
    .panels_per_tile = kTilePanels,
    .rows_scratch_bytes = conv_scratch_bytes,
    .is_depthwise = is_depthwise,
    .depthwise_lines = depthwise_lines,
    .depthwise_scratch_bytes = depthwise_scratch_bytes,
    .to_channels_first = to_channels_first,
};
}  // namespace halfbyte::HALFBYTE_LEVEL
