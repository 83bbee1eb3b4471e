// The table of matrix kernels of one level.
#pragma once
#include "matmul_float.inl.h"
#include "matmul_int8.inl.h"
#include "quantize_rows.inl.h"
#ifdef HALFBYTE_TILES
#include "matmul_int8_tiles.inl.h"
#endif

namespace halfbyte {
namespace {

constexpr MatmulKernels matmul_kernels() {
#ifdef HALFBYTE_TILES
  constexpr auto int8 = matmul_int8_tiles;
  constexpr int64_t rows_per_tile = 2 * kTileSide;
#else
  constexpr auto int8 = matmul_int8;
  constexpr int64_t rows_per_tile = kTileRows;
#endif
  return {quantize_rows_dynamic, quantize_rows_static, pad_rows,      int8,          matmul_float,
          Scratch::bytes,        kTilePanels,          rows_per_tile, kFloatTileRows};
}

}  // namespace
}  // namespace halfbyte
