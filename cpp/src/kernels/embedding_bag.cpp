#include "level.h"
// What the level offers comes first: the kernels are written in terms of it.
#include "embedding_bag.inl.h"

namespace halfbyte::HALFBYTE_LEVEL {
constinit const EmbeddingBagKernels embedding_bag_table = embedding_bag_kernels();
}  // namespace halfbyte::HALFBYTE_LEVEL
