// What the kernels of gptq.h mean, as plain loops in float64.
#pragma once
#include "halfbyte/gptq.h"

namespace halfbyte::reference {

// matrix[features, features] += x^T x
void hessian(const HessianInput& input, double* matrix);

// Rounds every row with the given scales (problem.search is not looked at). codes is [rows, columns]; tie[row] is how
// close the row came to rounding another way, in steps of the scale: a float32 kernel may differ where it is tiny.
void gptq_round(const RoundProblem& problem, uint8_t* codes, double* loss, double* tie);

// Polishes every row; hessian is [columns, columns]. scale, zero_point and codes of the problem are left alone, results
// go to the last three.
void gptq_polish(const PolishProblem& problem, const double* hessian, double* scale, int32_t* zero_point,
                 uint8_t* codes);

// e H e^T of one row.
double quadratic_error(const PolishProblem& problem, const double* hessian, int64_t row, const double* scale,
                       const int32_t* zero_point, const uint8_t* codes);

}  // namespace halfbyte::reference
