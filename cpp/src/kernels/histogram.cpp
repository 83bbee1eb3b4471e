#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "histogram.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const HistogramKernels histogram_table = histogram_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
