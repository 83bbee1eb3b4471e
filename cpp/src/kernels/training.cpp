#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "training.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const TrainingKernels training_table = training_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
