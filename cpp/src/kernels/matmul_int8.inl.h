// y = x Wᵀ with int8 x: exact int32 dot products of a quad (4 inputs) at a time, folded into float once a chunk.
//
// A tile is kTileRows x kTilePanels accumulators. Few rows (<= direct_rows()) read the codes once and unpack them in
// registers: bound by memory. More rows go through blocks of inputs whose unpacked codes fit in the L1 cache (8-bit
// codes are used where they lie), each row tile passing over the block in turn: bound by the dot products.
#pragma once
#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

struct Int8Tile {
  const TiledWeight& w;
  const QuantizedRows& x;
  Scratch scratch;
  int64_t row_begin;  // of the slab: row 0 of scratch.acc and scratch.part
  TilePanels panels;
  PanelCodes codes;  // of the block, from the input where the walk starts
  bool corrected;    // x has a zero point: scratch.column_sum is filled in
};

// acc += codes . a over `units` units. Range is the width that bounds the codes' values, Bits the one of their layout.
template <int Bits, int Range, int Rows, int Panels>
HALFBYTE_INLINE void dot_units(const PanelCodes& codes, int64_t offset, const int8_t* a, int64_t a_stride,
                               int64_t a_step, int64_t units, I32x16 (&acc)[Rows][Panels]) {
  constexpr int kQuads = kQuadsPerUnit<Bits>;
  constexpr int kSets = Rows * Panels < kSplitBelow ? 2 : 1;
  I32x16 sets[kSets][Rows][Panels];
  unroll<kSets>([&](auto s) {
    unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { sets[s][r][p] = s == 0 ? acc[r][p] : set_i32(0); }); });
  });
  const auto quad_step = [&](auto q, auto set) __attribute__((always_inline)) {
    DotQuad<Range> quads[Rows];
    unroll<Rows>([&](auto r) { quads[r] = load_quad<Range>(a + r * a_stride + 4 * q); });
    unroll<Panels>([&](auto p) {
      const DotRow<Range> row = dot_row<Range>(quad_codes<Bits, q>(codes[p] + offset));
      unroll<Rows>([&](auto r) { sets[set][r][p] = dot<Range>(sets[set][r][p], row, quads[r]); });
    });
  };
  if constexpr (kQuads == 1 && kSets == 2) {
    for (; units >= 2; units -= 2) {
      quad_step(Int<0>{}, Int<0>{});
      offset += unit_bytes(Bits), a += a_step;
      quad_step(Int<0>{}, Int<1>{});
      offset += unit_bytes(Bits), a += a_step;
    }
  }
  for (; units > 0; --units) {
    unroll<kQuads>([&](auto q) { quad_step(q, Int<q % kSets>{}); });
    offset += unit_bytes(Bits), a += a_step;
  }
  unroll<Rows>([&](auto r) {
    unroll<Panels>([&](auto p) {
      acc[r][p] = sets[0][r][p];
      if constexpr (kSets == 2) acc[r][p] = add_i32(acc[r][p], sets[1][r][p]);
    });
  });
}

// acc[row, panel] = fma(scale, float(t), acc) for a chunk that is complete.
template <int Rows, int Panels>
HALFBYTE_INLINE void fold_chunk(const Int8Tile& t, int64_t row, const Segment& segment,
                                const I32x16 (&dots)[Rows][Panels]) {
  const TileShape& shape = t.w.shape;
  const bool binary = shape.bits == 1 && t.w.zero_point == nullptr;
  const int64_t sums = shape.groups() * chunks_per_group(shape);
  const int32_t* chunk_sum = t.x.chunk_sum + row * sums + segment.chunk;
  float* acc = t.scratch.acc + (row - t.row_begin) * Panels * kPanel;
  unroll<Panels>([&](auto p) {
    const F32x16 scale = load_scales(t.w, segment.group, t.panels.index[p]);
    I32x16 zero = set_i32(binary ? 1 : 1 << (shape.bits - 1));
    if (t.w.zero_point != nullptr) zero = load_zero_points(t.w, segment.group, t.panels.index[p]);
    I32x16 correction = set_i32(0);
    if (t.corrected) {
      const int64_t in_group = (segment.chunk % chunks_per_group(shape)) * kMaxChunk;
      const int64_t group_inputs = std::min(shape.group_size, shape.in_features - segment.group * shape.group_size);
      const auto inputs = static_cast<int32_t>(std::clamp<int64_t>(group_inputs - in_group, 0, kMaxChunk));
      I32x16 sum = load_i32(t.scratch.column_sum + (segment.chunk * Panels + p) * kPanel);
      if (binary) sum = add_i32(sum, sum);
      correction = mul_i32(set_i32(t.x.zero_point), sub_i32(sum, mul_i32(set_i32(inputs), zero)));
    }
    unroll<Rows>([&](auto r) {
      I32x16 dot = binary ? add_i32(dots[r][p], dots[r][p]) : dots[r][p];
      dot = sub_i32(dot, mul_i32(zero, set_i32(chunk_sum[r * sums])));
      if (t.corrected) dot = sub_i32(dot, correction);
      float* at = acc + (r * Panels + p) * kPanel;
      store_f32(at, fma_f32(scale, to_float(dot), segment.first_of_all ? set_f32(0.0f) : load_f32(at)));
    });
  });
}

// One row tile over one block of inputs.
template <int Bits, int Range, int Rows, int Panels>
void int8_row_tile(const Int8Tile& t, int64_t row, Cursor cursor, int64_t k_end) {
  const int64_t a_stride = code_stride(t.w.shape);
  int64_t offset = 0;
  const int8_t* a = t.x.codes + row * a_stride + cursor.k;
  int32_t* part = static_cast<int32_t*>(t.scratch.part) + (row - t.row_begin) * Panels * kPanel;
  while (cursor.k < k_end) {
    const Segment segment = cursor.next(k_end);
    I32x16 dots[Rows][Panels];
    unroll<Rows>([&](auto r) {
      unroll<Panels>(
          [&](auto p) { dots[r][p] = segment.first ? set_i32(0) : load_i32(part + (r * Panels + p) * kPanel); });
    });
    const int64_t units = segment.inputs / k_unit(Bits);
    dot_units<Bits, Range>(t.codes, offset, a, a_stride, k_unit(Bits), units, dots);
    offset += units * unit_bytes(Bits);
    a += segment.inputs;
    if (segment.last) {
      fold_chunk(t, row, segment, dots);
    } else {
      unroll<Rows>(
          [&](auto r) { unroll<Panels>([&](auto p) { store_i32(part + (r * Panels + p) * kPanel, dots[r][p]); }); });
    }
  }
}

// scratch.column_sum = sum(u) of every chunk and column of the tile: a dot product with ones.
template <int Bits, int Panels>
void sum_columns(const Int8Tile& t) {
  alignas(64) static constexpr int8_t kOnes[32] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                                   1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  int64_t offset = 0;
  for (Cursor cursor(t.w.shape, kMaxChunk); cursor.k < t.w.shape.padded_in();) {
    const Segment segment = cursor.next(t.w.shape.padded_in());
    I32x16 sums[1][Panels];
    unroll<Panels>([&](auto p) { sums[0][p] = set_i32(0); });
    const int64_t units = segment.inputs / k_unit(Bits);
    dot_units<Bits, Bits>(t.codes, offset, kOnes, 0, 0, units, sums);
    offset += units * unit_bytes(Bits);
    unroll<Panels>(
        [&](auto p) { store_i32(t.scratch.column_sum + (segment.chunk * Panels + p) * kPanel, sums[0][p]); });
  }
}

// Codes of `units` units, one byte each, quad by quad: the 8-bit layout.
template <int Bits>
void unpack_units(const uint8_t* in, int64_t units, uint8_t* out) {
  for (int64_t unit = 0; unit < units; ++unit) {
    unroll<kQuadsPerUnit<Bits>>([&](auto q) { store_row(out + 64 * q, quad_codes<Bits, q>(in)); });
    in += unit_bytes(Bits), out += 64 * kQuadsPerUnit<Bits>;
  }
}

using Int8RowTile = void (*)(const Int8Tile&, int64_t row, Cursor, int64_t k_end);

// Tiles of 1 to Rows rows.
template <int Bits, int Range, int Rows, int Panels>
struct Int8RowTiles {
  Int8RowTile of_rows[Rows];
  constexpr Int8RowTiles() : of_rows() {
    [&]<int... R>(std::integer_sequence<int, R...>) {
      ((of_rows[R] = int8_row_tile<Bits, Range, R + 1, Panels>), ...);
    }(std::make_integer_sequence<int, Rows>{});
  }
};

// All of K for a tile of many rows, block by block.
void int8_blocked(Int8Tile& t, int64_t rows) {
  static constexpr Int8RowTiles<8, 8, kTileRows, kTilePanels> kWide;
  static constexpr Int8RowTiles<8, 7, kTileRows, kTilePanels> kNarrow;
  constexpr int64_t kBlock = kBlockBytes / (kPanel * kTilePanels);
  const TileShape& shape = t.w.shape;
  // One row tile reads 8-bit codes just once: no reason to stop between blocks.
  const int64_t block = shape.bits == 8 && rows <= kTileRows ? shape.padded_in() : kBlock;
  for (Cursor cursor(shape, kMaxChunk); cursor.k < shape.padded_in();) {
    const int64_t k_end = std::min(cursor.k + block, shape.padded_in());
    locate_codes(t.w, t.panels, kTilePanels, cursor.k, t.codes);
    if (shape.bits < 8) {
      with_bits(shape.bits, [&](auto bits) {
        for (int64_t p = 0; p < t.panels.present; ++p) {
          unpack_units<bits>(t.codes[p], (k_end - cursor.k) / k_unit(bits), t.scratch.block + p * kBlock * kPanel);
        }
      });
      for (int64_t p = 0; p < kTilePanels; ++p) {
        t.codes[p] = t.scratch.block + std::min(p, t.panels.present - 1) * kBlock * kPanel;
      }
    }
    run_row_tiles((shape.bits == 8 ? kWide.of_rows : kNarrow.of_rows), rows,
                  [&](Int8RowTile run, int64_t r) { run(t, t.row_begin + r, cursor, k_end); });
    while (cursor.k < k_end) cursor.next(k_end);
  }
}

void int8_tile(Int8Tile& t, int64_t rows, const float* bias, float* y, int64_t ldy) {
  const TileShape& shape = t.w.shape;
  with_bits(shape.bits, [&](auto bits) {
    locate_codes(t.w, t.panels, kTilePanels, 0, t.codes);
    if (t.corrected) sum_columns<bits, kTilePanels>(t);
    if constexpr (bits < 8) {
      if (rows <= direct_rows(bits)) {
        static constexpr Int8RowTiles<bits, bits, direct_rows(bits), kTilePanels> kDirect;
        return kDirect.of_rows[rows - 1](t, t.row_begin, Cursor(shape, kMaxChunk), shape.padded_in());
      }
    }
    int8_blocked(t, rows);
  });
  const auto finish = [&](F32x16 acc, int64_t r, F32x16 b) {
    const F32x16 scale = set_f32(t.x.scale[t.row_begin + r]);
    return bias == nullptr ? mul_f32(scale, acc) : fma_f32(scale, acc, b);
  };
  store_tile<kTilePanels>(shape, t.panels, t.scratch.acc, rows, bias, y + t.row_begin * ldy, ldy, finish);
}

void matmul_int8(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch) {
  for (int64_t row = row_begin; row < row_end; row += kSlabRows) {
    const int64_t rows = std::min(kSlabRows, row_end - row);
    for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
      Int8Tile t = {w, x, Scratch(scratch), row, TilePanels(panel, panel_end, kTilePanels), {}, x.zero_point != 0};
      int8_tile(t, rows, bias, y, ldy);
    }
  }
}

}  // namespace
}  // namespace halfbyte
