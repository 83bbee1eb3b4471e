// What the training and histogram kernels mean, one element at a time. Only the tests link it.
#pragma once
#include "halfbyte/histogram.h"
#include "halfbyte/training.h"

namespace halfbyte::reference {

// The chain of float32 additions that training.h asks for: element i of `count` adds to lane i % kElementLanes, and
// the lanes are added in halves. Sums of one block of one run.
struct BlockSums {
  float scale, zero_point;
};
BlockSums learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t count,
                           float scale, int32_t zero_point, int32_t qmin, int32_t qmax, Estimator estimator);
// The entry x is rounded to, in units of the scale; and what codebook_gradient does to one block.
float codebook_entry(float x, float scale, const CodebookGrid& grid);
float codebook_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t begin, int64_t count,
                        float scale, const CodebookGrid& grid);
// Element i of the tensor, added to `sums`.
void add_learned_gradient(const void* x, const void* grad, void* grad_x, FloatType type, int64_t i, float scale,
                          int32_t zero_point, int32_t qmin, int32_t qmax, Estimator estimator, BlockSums& sums);
int64_t count_histogram(const void* x, FloatType type, int64_t count, const HistogramRange& range, uint64_t* bins);

}  // namespace halfbyte::reference
