// The level that is being compiled. CMake compiles each .cpp of this folder once per ISA level, with that level's
// instruction set and two definitions: HALFBYTE_LEVEL, its name, and HALFBYTE_SIMD_HEADER, the header of its SIMD
// primitives. What the kernels define stays in anonymous namespaces; an object file exports its table and nothing else.
#pragma once
#include "halfbyte/dispatch.h"
#include HALFBYTE_SIMD_HEADER

namespace halfbyte::HALFBYTE_LEVEL {

extern const ElementwiseKernels elementwise_table;
extern const MatmulKernels matmul_table;
extern const TrainingKernels training_table;
extern const HistogramKernels histogram_table;
extern const GptqKernels gptq_table;
extern const RecurrentKernels recurrent_table;
extern const EmbeddingBagKernels embedding_bag_table;

}  // namespace halfbyte::HALFBYTE_LEVEL
