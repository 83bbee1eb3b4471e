// What every operator needs between torch's tensors and the kernels' pointers: checks, dtypes, contiguous data,
// threads. The Python wrappers check arguments first, with friendlier words; these checks keep a direct caller from
// reading past the end of a tensor.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "halfbyte/elementwise.h"
#include "halfbyte/types.h"
#include "ops.h"

namespace halfbyte::ops {

using torch::headeronly::ScalarType;

// Throws the parts of the message, streamed one after another, unless `ok`.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline FloatType float_type(ScalarType type, const char* name) {
  check(is_float_type(type), name, " has dtype ", torch::headeronly::toString(type),
        "; use float32, bfloat16 or float16");
  return type == ScalarType::Float      ? FloatType::kFloat32
         : type == ScalarType::BFloat16 ? FloatType::kBFloat16
                                        : FloatType::kFloat16;
}

inline FloatType float_type(const Tensor& tensor, const char* name) { return float_type(tensor.scalar_type(), name); }

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  check(tensor.scalar_type() == type, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()), ", not ",
        torch::headeronly::toString(type));
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must have shape [", rows,
        ", ", columns, "]");
}

// Entries of a codebook that is to be rounded to: increasing numbers, a code for each.
inline const float* check_codebook_entries(const Tensor& entries) {
  check_type(entries, ScalarType::Float, "codebook");
  check(entries.dim() == 1 && entries.is_contiguous() && entries.numel() >= 2 && entries.numel() <= kCodebookEntries,
        "codebook must be a contiguous vector of 2 to ", kCodebookEntries, " entries");
  const auto* values = static_cast<const float*>(entries.const_data_ptr());
  for (int64_t i = 0; i < entries.numel(); ++i) {
    check(std::isfinite(values[i]) && (i == 0 || values[i - 1] < values[i]), "codebook[", i, "]=", values[i],
          " is not finite or not above the entry before it");
  }
  return values;
}

// A codebook as kernels look codes up in it: an entry for every 4-bit code, whatever the width.
inline const float* check_codebook_table(const Tensor& table, int64_t bits, const OptionalTensor& zero_point) {
  check_type(table, ScalarType::Float, "codebook");
  check(table.dim() == 1 && table.is_contiguous() && table.numel() == kCodebookEntries,
        "codebook must be a contiguous vector of ", kCodebookEntries, " entries");
  check(bits <= 4 && !zero_point, "a codebook needs codes of at most 4 bits without zero points");
  return static_cast<const float*>(table.const_data_ptr());
}

// The tensor itself, or a contiguous copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether the memory of x [N, C, ...] is that of a contiguous [N, ..., C]. Strides of single elements do not matter.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto fits = [&](int64_t dim) {
    const bool fit = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fit;
  };
  if (!fits(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (!fits(dim)) return false;
  }
  return fits(0);
}

// Asks for huge pages. Memory that is fresh from the system costs a page fault for each 4 KB, together several times
// what a kernel takes to write it; with huge pages one for each 2 MB.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refused, nothing is lost
#endif
}

// An uninitialised contiguous tensor on the CPU. Not through torch::stable::new_empty, which looks its operator up by
// name at each call, 2 us.
inline Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  constexpr int64_t kLarge = 2 << 20;
  constexpr size_t kMostDims = 64;
  check(sizes.size() <= kMostDims, "a tensor of ", sizes.size(), " dimensions");
  std::array<int64_t, kMostDims> strides;
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes >= kLarge) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// f(begin, end) over [0, count) on torch's threads, at least `grain` items a thread.
template <class F>
inline void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count > 0) torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, f);
}

}  // namespace halfbyte::ops
