// What each elementwise kernel means, one element at a time, with the compiler's own rounding. Only the tests link it.
#pragma once
#include "halfbyte/elementwise.h"

namespace halfbyte::reference {

// Same arguments as the kernels of elementwise.h; `grid.inverse_scale` and repeated qparams are not needed.
void fake_quantize(const void* x, void* y, uint8_t* mask, FloatType type, const AffineGrid& grid, int64_t count);
void mask_gradient(const void* grad_out, const uint8_t* mask, void* grad_in, FloatType type, int64_t count);
void quantize(const void* x, FloatType type, void* q, CodeType code, const AffineGrid& grid, int64_t count);
void dequantize(const void* q, CodeType code, void* y, FloatType type, const AffineGrid& grid, int64_t count);
void minmax_runs(const void* x, FloatType type, int64_t run_length, int64_t runs, float* lo, float* hi);
void minmax_columns(const void* x, FloatType type, int64_t columns, int64_t rows, float* lo, float* hi);
// sum(importance * (x_hat - w)^2) in float64 of one group quantized with the given qparams.
double search_error(const float* w, const float* importance, int64_t count, const SearchOptions& options, float scale,
                    int32_t zero_point);
float to_float(const void* x, FloatType type, int64_t i);
void from_float(float value, void* y, FloatType type, int64_t i);

}  // namespace halfbyte::reference
