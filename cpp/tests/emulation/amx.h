// Lets the amx level run where there are no tiles: the compiler includes this file before it, after avx512.h where the
// CPU need not have AVX-512 either. The tiles of a thread are an array, and what the hardware refuses ends the program.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace halfbyte::tile_emulation {

// As ldtilecfg reads it and sttilecfg writes it.
struct TileSetup {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Tiles {
  TileSetup setup;
  uint8_t data[8][16][64];
  int64_t products;
};
inline thread_local Tiles tiles;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline void load_config(const void* from) {
  TileSetup setup;
  std::memcpy(&setup, from, sizeof(setup));
  require(setup.palette <= 1 && setup.start_row == 0, "palette or start row is not supported");
  for (int t = 0; t < 16; ++t) {
    require(setup.rows[t] <= (t < 8 ? 16 : 0) && setup.row_bytes[t] <= (t < 8 ? 64 : 0), "a tile is too large");
    require((setup.rows[t] == 0) == (setup.row_bytes[t] == 0), "a tile has rows or columns only");
  }
  tiles.setup = setup;
  std::memset(tiles.data, 0, sizeof(tiles.data));
}
inline void store_config(void* to) { std::memcpy(to, &tiles.setup, sizeof(tiles.setup)); }
inline void release() {
  tiles.setup = {};
  std::memset(tiles.data, 0, sizeof(tiles.data));
}

inline void require_configured(int tile) {
  require(tiles.setup.palette == 1 && tiles.setup.rows[tile] > 0, "a tile is used that is not configured");
}
inline void zero(int tile) {
  require_configured(tile);
  std::memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
}
inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < tiles.setup.rows[tile]; ++row) {
    std::memcpy(tiles.data[tile][row], static_cast<const uint8_t*>(from) + row * stride, tiles.setup.row_bytes[tile]);
  }
}
inline void store(int tile, void* to, int64_t stride) {
  require_configured(tile);
  for (int row = 0; row < tiles.setup.rows[tile]; ++row) {
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles.data[tile][row], tiles.setup.row_bytes[tile]);
  }
}

// sums += signed a * unsigned b. int32 wraps.
inline void dot_signed_unsigned(int sums, int a, int b) {
  require_configured(sums), require_configured(a), require_configured(b);
  const TileSetup& setup = tiles.setup;
  require(setup.rows[sums] == setup.rows[a] && setup.row_bytes[sums] == setup.row_bytes[b] &&
              setup.row_bytes[a] == 4 * setup.rows[b],
          "the shapes of a product do not agree");
  for (int row = 0; row < setup.rows[sums]; ++row) {
    uint32_t acc[16];
    std::memcpy(acc, tiles.data[sums][row], sizeof(acc));
    for (int quad = 0; quad < setup.rows[b]; ++quad) {
      int32_t x[4];
      for (int j = 0; j < 4; ++j) x[j] = static_cast<int8_t>(tiles.data[a][row][4 * quad + j]);
      const uint8_t* codes = tiles.data[b][quad];
      for (int o = 0; o < setup.row_bytes[sums] / 4; ++o) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) sum += x[j] * codes[4 * o + j];
        acc[o] += static_cast<uint32_t>(sum);
      }
    }
    std::memcpy(tiles.data[sums][row], acc, sizeof(acc));
  }
  ++tiles.products;
}

}  // namespace halfbyte::tile_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _tile_loadconfig halfbyte::tile_emulation::load_config
#define _tile_storeconfig halfbyte::tile_emulation::store_config
#define _tile_release halfbyte::tile_emulation::release
#define _tile_zero halfbyte::tile_emulation::zero
#define _tile_loadd halfbyte::tile_emulation::load
#define _tile_stored halfbyte::tile_emulation::store
#define _tile_dpbsud halfbyte::tile_emulation::dot_signed_unsigned
