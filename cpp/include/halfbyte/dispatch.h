// One table of kernels per ISA level; the best one this CPU supports is chosen once, at import.
// HALFBYTE_CPU_CAPABILITY=scalar|avx2|avxvnni|avx512vnni|amx forces one; an unknown or unsupported name is an error
// there.
#pragma once
#include <string>
#include <vector>

#include "halfbyte/elementwise.h"
#include "halfbyte/embedding_bag.h"
#include "halfbyte/gptq.h"
#include "halfbyte/histogram.h"
#include "halfbyte/matmul.h"
#include "halfbyte/recurrent.h"
#include "halfbyte/training.h"

namespace halfbyte {

struct ConvKernels;  // conv.h
struct PoolKernels;  // pool.h

struct KernelTable {
  const char* name;
  const ElementwiseKernels& elementwise;
  const MatmulKernels& matmul;
  const TrainingKernels& training;
  const HistogramKernels& histogram;
  const GptqKernels& gptq;
  const RecurrentKernels& recurrent;
  const EmbeddingBagKernels& embedding_bag;
  const ConvKernels& conv;
  const PoolKernels& pool;
};

namespace scalar {
extern const KernelTable kernel_table;
}
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avxvnni {
extern const KernelTable kernel_table;
}
namespace avx512vnni {
extern const KernelTable kernel_table;
}

namespace amx {
extern const KernelTable kernel_table;
}

std::vector<std::string> compiled_levels();   // slowest first
std::vector<std::string> supported_levels();  // of those, what this CPU and OS can run
const KernelTable& kernels();                 // the active table
std::string active_level();
void set_active_level(const std::string& name);  // throws std::invalid_argument with the allowed names

}  // namespace halfbyte
