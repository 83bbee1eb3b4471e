// The amx level's primitives: those of avx512vnni, and products of whole tiles. A tile of x is 16 rows x 64 inputs, one
// of w is 16 rows of the tiles layout (64 inputs x 16 outputs) as it lies in memory.
#pragma once
#include "simd_avx512vnni.h"

#define HALFBYTE_TILES  // matmul.inl.h: products of many rows go through matmul_int8_tiles.inl.h

namespace halfbyte {
namespace {

constexpr int kTileSide = 16;              // rows of x, or outputs
constexpr int kTileInputs = 64;            // of one product
constexpr int kTileBytes = 16 * 64;        // of any tile
constexpr int kTileSums = kTileBytes / 4;  // int32 of a tile of sums

// The operand of ldtilecfg and sttilecfg.
struct alignas(64) TileConfig {
  uint8_t palette;  // 0: no tiles
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig kWholeTiles = {.palette = 1,
                                    .start_row = 0,
                                    .reserved = {},
                                    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                                    .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

// Eight whole tiles for as long as it lives. The configuration is the thread's and other libraries keep theirs in it
// from call to call, so what was there comes back; contents of tiles do not, as no call has to keep those. GCC's
// intrinsics state 8 of the 64 bytes as their operand, hence the statements that name all.
class WholeTiles {
 public:
  WholeTiles() {
    _tile_storeconfig(&before_);
    asm volatile("" : "+m"(before_));
    _tile_loadconfig(&kWholeTiles);
  }
  ~WholeTiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      asm volatile("" : "+m"(before_));
      _tile_loadconfig(&before_);
    }
  }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;

 private:
  TileConfig before_;
};

// Between accesses of the same memory by tiles and by C++: GCC's tile loads do not say that they read it.
HALFBYTE_INLINE void tile_fence() { asm volatile("" ::: "memory"); }

}  // namespace
}  // namespace halfbyte
