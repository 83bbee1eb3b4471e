// The level that is being compiled. CMake compiles each .cpp of this folder once per ISA level, with that level's
// instruction set and two definitions: HALFBYTE_LEVEL, its name, and HALFBYTE_SIMD_HEADER, the header of its SIMD
// primitives. A level that compiles only some of the files has the other tables of its HALFBYTE_BASE_LEVEL: amx those
// of avx512vnni but for the matrix products. What the kernels define stays in anonymous namespaces; an object file
// exports its table and nothing else.
#pragma once
#include "halfbyte/dispatch.h"
#include HALFBYTE_SIMD_HEADER

#ifdef HALFBYTE_BASE_LEVEL
namespace halfbyte::HALFBYTE_BASE_LEVEL {
#else
namespace halfbyte::HALFBYTE_LEVEL {
extern const MatmulKernels matmul_table;
#endif

extern const ElementwiseKernels elementwise_table;
extern const TrainingKernels training_table;
extern const HistogramKernels histogram_table;
extern const GptqKernels gptq_table;
extern const RecurrentKernels recurrent_table;
extern const EmbeddingBagKernels embedding_bag_table;
extern const ConvKernels conv_table;
extern const PoolKernels pool_table;

}  // namespace

#ifdef HALFBYTE_BASE_LEVEL
namespace halfbyte::HALFBYTE_LEVEL {
extern const MatmulKernels matmul_table;
using HALFBYTE_BASE_LEVEL::conv_table;
using HALFBYTE_BASE_LEVEL::elementwise_table;
using HALFBYTE_BASE_LEVEL::embedding_bag_table;
using HALFBYTE_BASE_LEVEL::gptq_table;
using HALFBYTE_BASE_LEVEL::histogram_table;
using HALFBYTE_BASE_LEVEL::pool_table;
using HALFBYTE_BASE_LEVEL::recurrent_table;
using HALFBYTE_BASE_LEVEL::training_table;
}  // namespace halfbyte::HALFBYTE_LEVEL
#endif
