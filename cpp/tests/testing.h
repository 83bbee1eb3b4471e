// What the test programs share: CHECK, the level at hand, repeatable random values, floats by their bits.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "halfbyte/types.h"

namespace halfbyte::testing {

inline const char* level = "";  // named in the message of every failed CHECK

#define CHECK(condition, ...)                                                                            \
  do {                                                                                                   \
    if (!(condition)) {                                                                                  \
      std::fprintf(stderr, "%s:%d: %s: %s: ", __FILE__, __LINE__, halfbyte::testing::level, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                                                 \
      std::fputc('\n', stderr);                                                                          \
      std::exit(1);                                                                                      \
    }                                                                                                    \
  } while (false)

constexpr FloatType kFloatTypes[] = {FloatType::kFloat32, FloatType::kBFloat16, FloatType::kFloat16};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline size_t bytes_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// The same ones in every run.
inline uint64_t random_word() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
inline uint32_t random_bits() { return static_cast<uint32_t>(random_word() >> 32); }
inline float random_unit() { return static_cast<float>(random_word() >> 40) * 0x1p-23f - 1.f; }  // in [-1, 1)

// A buffer of exactly the right size on the heap, so that AddressSanitizer sees a step past it.
using Bytes = std::vector<unsigned char>;

inline bool same_bits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

}  // namespace halfbyte::testing
