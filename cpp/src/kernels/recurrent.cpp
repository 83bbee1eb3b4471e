#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "recurrent.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const RecurrentKernels recurrent_table = recurrent_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
