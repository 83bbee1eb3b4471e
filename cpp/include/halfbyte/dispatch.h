// One table of kernels per ISA level; the best one this CPU supports is chosen once, at import.
// HALFBYTE_CPU_CAPABILITY=scalar|avx2|avxvnni|avx512vnni forces one; an unknown or unsupported name is an error there.
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

struct KernelTable {
  const char* name;
  ElementwiseKernels elementwise;
  MatmulKernels matmul;
  TrainingKernels training;
  HistogramKernels histogram;
  GptqKernels gptq;
  RecurrentKernels recurrent;
  EmbeddingBagKernels embedding_bag;
};

extern const KernelTable kScalarTable;
extern const KernelTable kAvx2Table;
extern const KernelTable kAvxVnniTable;
extern const KernelTable kAvx512VnniTable;

std::vector<std::string> compiled_levels();   // slowest first
std::vector<std::string> supported_levels();  // of those, what this CPU and OS can run
const KernelTable& kernels();                 // the active table
std::string active_level();
void set_active_level(const std::string& name);  // throws std::invalid_argument with the allowed names

}  // namespace halfbyte
