// Working memory of kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>

namespace halfbyte::ops {

// Uninitialised bytes that start on a cache line.
class AlignedScratch {
 public:
  explicit AlignedScratch(int64_t bytes)
      : memory_(::operator new(static_cast<size_t>(std::max<int64_t>(bytes, 1)), std::align_val_t{64})) {}
  AlignedScratch(const AlignedScratch&) = delete;
  AlignedScratch& operator=(const AlignedScratch&) = delete;
  ~AlignedScratch() { ::operator delete(memory_, std::align_val_t{64}); }
  void* get() const { return memory_; }
  float* floats() const { return static_cast<float*>(memory_); }

 private:
  void* memory_;
};

}  // namespace halfbyte::ops
