// Which elements of a tensor share qparams: the one picture of elementwise.h, from `axis` and `group_size`.
#pragma once
#include <algorithm>
#include <vector>

#include "tensor_checks.h"

namespace halfbyte::ops {

constexpr int64_t kShortRun = 32;  // shorter runs along an axis advance their qparams with the element

// Run r of `run_length` elements has those of channel r % channels.
struct Runs {
  int64_t run_length, channels;
};

inline Runs runs_of(const Tensor& x, OptionalInt axis, OptionalInt group_size) {
  check(!(axis && group_size), "axis and group_size exclude each other");
  const int64_t dim = x.dim();
  if (group_size) {
    check(dim >= 1, "group_size needs at least one dimension");
    const int64_t last = x.size(dim - 1);
    check(*group_size >= 1 && last % *group_size == 0, "group_size=", *group_size, " does not divide the last size ",
          last);
    return {*group_size, x.numel() / *group_size};
  }
  if (!axis) return {std::max<int64_t>(x.numel(), 1), 1};
  const int64_t at = *axis < 0 ? *axis + dim : *axis;
  check(at >= 0 && at < dim, "axis=", *axis, " is not one of the ", dim, " dimensions");
  int64_t run_length = 1;
  for (int64_t d = at + 1; d < dim; ++d) run_length *= x.size(d);
  return {run_length, x.size(at)};
}

// The shape of the qparams of x.
inline std::vector<int64_t> qparams_shape(const Tensor& x, const Runs& runs, OptionalInt axis, OptionalInt group_size) {
  if (axis) return {runs.channels};
  if (!group_size) return {};
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() /= *group_size;
  return shape;
}

}  // namespace halfbyte::ops
