// y = x Wᵀ with int8 x of at least 16 rows, by AMX tiles: TDPBSUD multiplies 16 rows x 64 inputs with 64 inputs x 16
// outputs, as exactly as the dot products of matmul_int8.inl.h, which does fewer rows and small groups.
//
// Four tiles of sums (32 rows x 2 panels), two of x and two of w: one load a product. A block of inputs of two panels
// (14 KB as 8-bit codes) stays in the L1 cache while all rows of a slab (168 KB of codes of x, in the L2 cache) pass
// over it. 8-bit codes are used where they lie. Narrower ones are unpacked into the block, and so are 8-bit ones whose
// groups are not whole tiles: each run of a group then gets zeros up to whole tiles.
#pragma once
#include "matmul_int8.inl.h"

namespace halfbyte {
namespace {

constexpr int kPair = 2;                // panels, and tiles of x, side by side
constexpr int64_t kTiledBlock = 448;    // inputs of a block: 7 products
constexpr int64_t kSmallestGroup = 32;  // below, zeros would be most of a tile
constexpr int64_t kPanelBlockBytes = kBlockBytes / kPair;
constexpr int64_t kMaxRuns = 2 + (kTiledBlock - 2) / kSmallestGroup;  // whole groups, and parts of two others
// A run grows by at most 60 inputs, or to one tile where it is shorter.
static_assert(kMaxRuns * kTileInputs * kPanel <= kPanelBlockBytes);
static_assert((kTiledBlock + 60 * (2 + kTiledBlock / kTileInputs)) * kPanel <= kPanelBlockBytes);

// Inputs of a block inside one chunk, as `products` products of whole tiles.
struct TileRun {
  Segment segment;
  int64_t products;
  int64_t x;  // first input that the tiles of x hold
  int64_t w;  // offset of the first tile of w from a panel's codes
};

struct TiledBlock {
  TileRun runs[kMaxRuns];
  int count;
  const uint8_t* codes[kPair];
  // What the row tiles ask memory for: the next block's packed codes, `per_product` lines with each product.
  const uint8_t* next[kPair];
  int64_t next_lines, per_product;
};

// The runs of inputs [cursor.k, k_end) and the codes of both panels for them.
TiledBlock tiled_block(const Int8Tile& t, Cursor cursor, int64_t k_end, int64_t row_pairs) {
  const TileShape& shape = t.w.shape;
  const bool in_place = shape.bits == 8 && shape.padded_group() % kTileInputs == 0;
  const int64_t begin = cursor.k, stride = code_stride(shape);
  PanelCodes packed;
  locate_codes(t.w, t.panels, kPair, begin, packed);
  TiledBlock block = {};
  int64_t at = 0;  // bytes of the block that are in use
  while (cursor.k < k_end) {
    const int64_t k = cursor.k;
    TileRun& run = block.runs[block.count++];
    run.segment = cursor.next(k_end);
    run.products = ceil_div(run.segment.inputs, static_cast<int64_t>(kTileInputs));
    // At the end of a row, tiles begin earlier rather than end later: they meet zeros there.
    run.x = std::min(k, stride - run.products * kTileInputs);
    run.w = at;
    at += run.products * kTileBytes;
    if (in_place) continue;
    const int64_t before = (k - run.x) * kPanel, size = run.segment.inputs * kPanel;
    for (int64_t p = 0; p < t.panels.present; ++p) {
      uint8_t* to = t.scratch.block + p * kPanelBlockBytes + run.w;
      std::memset(to, 0, static_cast<size_t>(before));
      with_bits(shape.bits, [&](auto bits) {
        unpack_units<bits>(packed[p] + (k - begin) / k_unit(bits) * unit_bytes(bits), run.segment.inputs / k_unit(bits),
                           to + before);
      });
      std::memset(to + before + size, 0, static_cast<size_t>(run.products * kTileBytes - before - size));
    }
  }
  const int64_t packed_bytes = (k_end - begin) * kPanel * shape.bits / 8;
  for (int64_t p = 0; p < kPair; ++p) {
    block.codes[p] = in_place ? packed[p] : t.scratch.block + std::min(p, t.panels.present - 1) * kPanelBlockBytes;
    // After the last block, the next one is the first of the following panels.
    block.next[p] = packed[p] + packed_bytes + (k_end == shape.padded_in() ? (kPair - 1) * shape.panel_bytes() : 0);
  }
  block.next_lines = packed_bytes / 64;
  block.per_product = ceil_div(block.next_lines, row_pairs * (at / kTileBytes));
  return block;
}

// acc = fma(scale, float(t), acc) for `Rows` rows whose chunk is complete; `sums` are two tiles, one for each panel.
template <int Rows>
HALFBYTE_INLINE void fold_sums(const Int8Tile& t, int64_t row, const Segment& segment, const int32_t* sums) {
  I32x16 dots[Rows][kPair];
  begin_chunk<Rows, kPair>(t, row, segment, dots);
  unroll<Rows>([&](auto r) {
    unroll<kPair>([&](auto p) { dots[r][p] = add_i32(dots[r][p], load_i32(sums + p * kTileSums + r * kPanel)); });
  });
  end_chunk<Rows, kPair>(t, row, segment, dots);
  fold_dots<Rows, kPair>(t, row, segment, dots);
}

// A tile of rows. The last of a slab may begin before the end of the one before it: `known` of its rows are already
// done.
struct RowTile {
  int64_t row, known;
  int32_t* part;  // its sums of a chunk that is not complete, from block to block

  RowTile(const Int8Tile& t, int64_t rows, int64_t index)
      : row(t.row_begin + std::min(index * kTileSide, rows - kTileSide)),
        known(t.row_begin + index * kTileSide - row),
        part(static_cast<int32_t*>(t.scratch.part) + index * kPair * kTileSums) {}
};

inline void fold_tile(const Int8Tile& t, const RowTile& tile, const Segment& segment, const int32_t* sums) {
  constexpr int kRows = 4;
  int64_t r = tile.known;
  for (; r % kRows != 0; ++r) fold_sums<1>(t, tile.row + r, segment, sums + r * kPanel);
  for (; r < kTileSide; r += kRows) fold_sums<kRows>(t, tile.row + r, segment, sums + r * kPanel);
}

// One block for one or two tiles of rows. Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 the panels' codes.
template <bool Two>
void multiply_tiles(const Int8Tile& t, TiledBlock& block, const RowTile& first, const RowTile& second, int32_t* whole) {
  const int64_t stride = code_stride(t.w.shape);
  for (const TileRun* run = block.runs; run < block.runs + block.count; ++run) {
    // Sums that need not last until the next block go where they stay in the L1 cache.
    const bool complete = run->segment.first && run->segment.last;
    int32_t* sums = complete ? whole : first.part;
    int32_t* sums2 = complete ? whole + kPair * kTileSums : second.part;
    if (run->segment.first) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (Two) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + kTileSums, 64);
      if constexpr (Two) {
        _tile_loadd(2, sums2, 64);
        _tile_loadd(3, sums2 + kTileSums, 64);
      }
    }
    const int8_t* x = t.x.codes + first.row * stride + run->x;
    const int8_t* x2 = t.x.codes + second.row * stride + run->x;
    const uint8_t* w = block.codes[0] + run->w;
    const uint8_t* w2 = block.codes[1] + run->w;
    for (int64_t product = 0; product < run->products; ++product) {
      for (int64_t line = std::min(block.per_product, block.next_lines); line > 0; --line) {
        block.next_lines -= 1;
        for (const uint8_t* next : block.next) prefetch(next + 64 * block.next_lines);
      }
      _tile_loadd(4, x, stride);
      _tile_loadd(6, w, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, w2, 64);
      _tile_dpbsud(1, 4, 7);
      if constexpr (Two) {
        _tile_loadd(5, x2, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
      x += kTileInputs, x2 += kTileInputs, w += kTileBytes, w2 += kTileBytes;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTileSums, 64);
    if constexpr (Two) {
      _tile_stored(2, sums2, 64);
      _tile_stored(3, sums2 + kTileSums, 64);
    }
    tile_fence();
    if (run->segment.last) {
      fold_tile(t, first, run->segment, sums);
      if constexpr (Two) fold_tile(t, second, run->segment, sums2);
    }
  }
}

// All of K for two panels and a slab of rows.
void multiply_panels(Int8Tile& t, int64_t rows) {
  const TileShape& shape = t.w.shape;
  if (t.corrected) {
    locate_codes(t.w, t.panels, kPair, 0, t.codes);
    with_bits(shape.bits, [&](auto bits) { sum_columns<bits, kPair>(t); });
  }
  std::fill_n(t.scratch.acc, rows * kPair * kPanel, 0.0f);
  const int64_t tiles = ceil_div(rows, static_cast<int64_t>(kTileSide));
  int32_t* whole = static_cast<int32_t*>(t.scratch.part) + tiles * kPair * kTileSums;
  for (Cursor cursor(shape, kMaxChunk); cursor.k < shape.padded_in();) {
    const int64_t k_end = std::min(cursor.k + kTiledBlock, shape.padded_in());
    TiledBlock block = tiled_block(t, cursor, k_end, ceil_div(tiles, int64_t{2}));
    tile_fence();
    for (int64_t tile = 0; tile < tiles; tile += 2) {
      const RowTile first(t, rows, tile);
      if (tile + 1 < tiles) {
        multiply_tiles<true>(t, block, first, RowTile(t, rows, tile + 1), whole);
      } else {
        multiply_tiles<false>(t, block, first, first, whole);
      }
    }
    while (cursor.k < k_end) cursor.next(k_end);
  }
}

void matmul_int8_tiles(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end,
                       int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy,
                       void* scratch) {
  if (row_end - row_begin < kTileSide || w.shape.padded_group() < kSmallestGroup) {
    return matmul_int8(w, x, row_begin, row_end, panel_begin, panel_end, bias, y, ldy, scratch);
  }
  const WholeTiles configured;
  static_assert((kSlabRows / kTileSide + 2) * kPair * kTileBytes <= Scratch::kStateBytes);
  run_slabs(row_begin, row_end, kSlabRows, [&](int64_t row, int64_t rows) {
    for (int64_t panel = panel_begin; panel < panel_end; panel += kPair) {
      Int8Tile t(w, x, scratch, row, TilePanels(panel, panel_end, kPair));
      multiply_panels(t, rows);
      store_int8_tile<kPair>(t, rows, bias, y, ldy);
    }
  });
}

}  // namespace
}  // namespace halfbyte
