#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "matmul.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const MatmulKernels matmul_table = matmul_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
