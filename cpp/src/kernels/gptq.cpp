#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "gptq.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const GptqKernels gptq_table = gptq_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
