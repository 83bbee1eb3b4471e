// Small plain types shared by every kernel: no torch, no Python, no allocation.
#pragma once
#include <cstdint>

namespace halfbyte {

enum class FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace halfbyte
