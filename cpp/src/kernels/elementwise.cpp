#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "elementwise.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const ElementwiseKernels elementwise_table = elementwise_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
