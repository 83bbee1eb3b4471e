// What the matrix kernels mean: plain loops in the order that matmul.h fixes. Only the tests link this.
#pragma once
#include "halfbyte/matmul.h"

namespace halfbyte::reference {

// The same functions as a level's, bit for bit. `scratch` is not used.
MatmulKernels matmul_kernels();

}  // namespace halfbyte::reference
