// The avx2 level: its SIMD primitives, then every kernel compiled on top of them. Exports one table and nothing else.
#include "halfbyte/dispatch.h"
#include "simd_avx2.h"
// The kernels below are written in terms of the primitives above, in an anonymous namespace.
#include "elementwise.inl.h"
#include "embedding_bag.inl.h"
#include "gptq.inl.h"
#include "histogram.inl.h"
#include "matmul.inl.h"
#include "recurrent.inl.h"
#include "training.inl.h"

namespace halfbyte {
// constinit: filling the table at load time would run this level's instructions on every CPU.
constinit const KernelTable kAvx2Table = {
    "avx2",         elementwise_kernels(), matmul_kernels(),       training_kernels(), histogram_kernels(),
    gptq_kernels(), recurrent_kernels(),   embedding_bag_kernels()};
}  // namespace halfbyte
