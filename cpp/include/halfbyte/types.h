// Small plain types shared by every kernel: no torch, no Python, no allocation.
#pragma once
#include <cstdint>

namespace halfbyte {

enum class FloatType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// static, like all functions of these headers: every ISA level must keep its own copy, or the linker would keep one for
// all, with the instructions of whichever level it found first (cpp/tests/check_symbols.cmake).
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace halfbyte
