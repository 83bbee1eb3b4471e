// The table of matrix kernels of one level.
#pragma once
#include "matmul_float.inl.h"
#include "matmul_int8.inl.h"
#include "quantize_rows.inl.h"

namespace halfbyte {
namespace {

constexpr MatmulKernels matmul_kernels() {
  return {quantize_rows_dynamic, quantize_rows_static, pad_rows,    matmul_int8,
          matmul_float,          Scratch::bytes,       kTilePanels, kTileRows};
}

}  // namespace
}  // namespace halfbyte
