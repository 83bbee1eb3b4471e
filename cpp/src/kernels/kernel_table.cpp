// The table of one level, of the tables that the other files of this folder define for it.
#include "level.h"

#define HALFBYTE_QUOTED(text) #text
#define HALFBYTE_NAME_OF(level) HALFBYTE_QUOTED(level)

namespace halfbyte::HALFBYTE_LEVEL {
// constinit: filling the table at load time would run this level's instructions on every CPU.
constinit const KernelTable kernel_table = {
    .name = HALFBYTE_NAME_OF(HALFBYTE_LEVEL),
    .elementwise = elementwise_table,
    .matmul = matmul_table,
    .training = training_table,
    .histogram = histogram_table,
    .gptq = gptq_table,
    .recurrent = recurrent_table,
    .embedding_bag = embedding_bag_table,
    .conv = conv_table,
    .pool = pool_table,
};
}  // namespace halfbyte::HALFBYTE_LEVEL
