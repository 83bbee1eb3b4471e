// Scratch memory of one thread, kept from call to call while it is small.
#pragma once
#include <cstddef>
#include <memory>
#include <new>

#include "halfbyte/types.h"

namespace halfbyte::ops {

constexpr int64_t kKeptBytes = 1 << 20;  // larger buffers are not kept from call to call

// 64-byte aligned memory.
class LocalBuffer {
 public:
  std::byte* get(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(operator new(static_cast<size_t>(bytes), kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }
  void release_if_large() {
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t size_ = 0;
};

// Parts of one buffer, each 64-byte aligned: sizes first, then pointers.
class Parts {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// The buffer of the calling thread, for what lives as long as one call of an operator.
inline LocalBuffer& call_buffer() {
  thread_local LocalBuffer buffer;
  return buffer;
}

}  // namespace halfbyte::ops
