#include "level.h"
// The level's flags are all that these loops take from it.
#include "pool.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const PoolKernels pool_table = {
    .max_codes = pool_max<int8_t>,
    .max_floats = pool_max<float>,
    .average = pool_average,
    .copy_pixels = copy_pixels,
    .codes_to_channels_first = codes_to_channels_first,
};
}  // namespace halfbyte::HALFBYTE_LEVEL
