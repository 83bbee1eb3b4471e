// Register-blocked products of float32 panels, and the symmetric rank-k update built on them.
//
// multiply_add() computes C[8, 48] += A^T B for A [k, 8] and B [k, 48]. avx512: 8 x 3 accumulators, 3 loads and 8
// broadcasts for 24 fused multiply-adds, bound by the two FMA units; avx2: quarters of 4 rows x 3 vectors of 8.
// Each element sums its products in order and adds the sum to C, whatever the shape of the register tile: sums of many
// calls have short chains of roundings.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "halfbyte/gptq.h"
#include "load_store.inl.h"

namespace halfbyte {
namespace {
namespace gptq {

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kRows = 8;
inline Vector load_vector(const float* p) { return _mm512_loadu_ps(p); }
inline void store_vector(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector repeat(float value) { return _mm512_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
using Vector = __m256;
constexpr int kRows = 4;
inline Vector load_vector(const float* p) { return _mm256_loadu_ps(p); }
inline void store_vector(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector repeat(float value) { return _mm256_set1_ps(value); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vector __attribute__((vector_size(16)));
constexpr int kRows = 2;
inline Vector load_vector(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store_vector(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }
inline Vector repeat(float value) { return Vector{value, value, value, value}; }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

constexpr int kVectors = 3;
constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
constexpr int64_t kDepth = 128;  // tokens or columns of one pass: both operands of a tile stay in the first-level cache

// C[8, 48] += A^T B; row t of A is a[t * lda : + 8], row t of B is b[t * 48 : + 48], row r of C is c[r * 48 : + 48].
inline void multiply_add(const float* a, int64_t lda, const float* b, int64_t depth, float* c) {
  static_assert(kPanelWidth % (kVectors * kWidth) == 0 && kFeedbackColumns % kRows == 0);
  for (int64_t column = 0; column < kPanelWidth; column += kVectors * kWidth) {
    for (int64_t row = 0; row < kFeedbackColumns; row += kRows) {
      float* out = c + row * kPanelWidth + column;
      Vector sum[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[r][v] = repeat(0.f);
      }
      const float* left = a + row;
      const float* right = b + column;
      for (int64_t t = 0; t < depth; ++t, left += lda, right += kPanelWidth) {
        Vector factor[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) factor[v] = load_vector(right + v * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vector scalar = repeat(left[r]);
#pragma GCC unroll 3
          for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(scalar, factor[v], sum[r][v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          float* at = out + r * kPanelWidth + v * kWidth;
          store_vector(at, add(load_vector(at), sum[r][v]));
        }
      }
    }
  }
}

constexpr int64_t kTile = kPanelWidth * kPanelWidth;
constexpr int64_t kPanelFloats = kDepth * kPanelWidth;
constexpr int64_t kHessianScratch = kPanelsPerBlock * kPanelsPerBlock * kTile + 2 * kPanelsPerBlock * kPanelFloats;

// Tokens [begin, begin + count) of panels [panel_begin, panel_end), as [panel][token][48] floats, zero past the last
// feature.
template <FloatType Type>
inline void pack_panels(const HessianInput& input, const void* rows, int64_t begin, int64_t count, int64_t panel_begin,
                        int64_t panel_end, float* packed) {
  namespace e = elementwise;
  const auto* x = static_cast<const e::Element<Type>*>(rows) + begin * input.features;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel, packed += kPanelFloats) {
    const int64_t first = panel * kPanelWidth;
    const int64_t width = std::min(kPanelWidth, input.features - first);
    for (int64_t t = 0; t < count; ++t) {
      const e::Element<Type>* in = x + t * input.features + first;
      float* out = packed + t * kPanelWidth;
      int64_t i = 0;
      for (; i + e::kLanes <= width; i += e::kLanes) e::store(out + i, e::load_floats<Type>(in + i));
      for (; i < width; ++i) out[i] = e::widen<Type>(in[i]);
      for (; i < kPanelWidth; ++i) out[i] = 0.f;
    }
  }
}

template <FloatType Type>
inline void hessian_block(const HessianInput& input, const PanelBlock& block, double* tiles, float* scratch) {
  float* sums = scratch;
  float* left = sums + kPanelsPerBlock * kPanelsPerBlock * kTile;
  float* right = left + kPanelsPerBlock * kPanelFloats;
  const bool symmetric = input.y == nullptr, diagonal = symmetric && block.row_begin == block.column_begin;
  const auto for_each_tile = [&](auto f) {
    for (int64_t i = block.row_begin; i < block.row_end; ++i) {
      for (int64_t j = block.column_begin; j < (symmetric ? std::min(block.column_end, i + 1) : block.column_end);
           ++j) {
        const int64_t row = i - block.row_begin, column = j - block.column_begin;
        f(i, j, row, column, sums + (row * kPanelsPerBlock + column) * kTile);
      }
    }
  };
  for_each_tile([](int64_t, int64_t, int64_t, int64_t, float* sum) { std::memset(sum, 0, sizeof(float) * kTile); });
  for (int64_t begin = 0; begin < input.tokens; begin += kDepth) {
    const int64_t count = std::min(kDepth, input.tokens - begin);
    pack_panels<Type>(input, symmetric ? input.x : input.y, begin, count, block.row_begin, block.row_end, left);
    if (!diagonal) pack_panels<Type>(input, input.x, begin, count, block.column_begin, block.column_end, right);
    for_each_tile([&](int64_t, int64_t, int64_t row, int64_t column, float* sum) {
      const float* a = left + row * kPanelFloats;
      const float* b = (diagonal ? left : right) + column * kPanelFloats;
      for (int64_t r = 0; r < kPanelWidth; r += kFeedbackColumns) {
        multiply_add(a + r, kPanelWidth, b, count, sum + r * kPanelWidth);
      }
    });
  }
  for_each_tile([&](int64_t i, int64_t j, int64_t, int64_t, const float* sum) {
    if (!symmetric) {
      const int64_t rows = std::min(kPanelWidth, input.features - i * kPanelWidth);
      const int64_t columns = std::min(kPanelWidth, input.features - j * kPanelWidth);
      double* total = tiles + i * kPanelWidth * input.features + j * kPanelWidth;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          total[r * input.features + c] += static_cast<double>(sum[r * kPanelWidth + c]);
        }
      }
      return;
    }
    double* total = tiles + (i * (i + 1) / 2 + j) * kTile;
    for (int64_t n = 0; n < kTile; ++n) total[n] += static_cast<double>(sum[n]);
  });
}

}  // namespace gptq
}  // namespace
}  // namespace halfbyte
