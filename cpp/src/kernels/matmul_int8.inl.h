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
  int64_t chunks;    // of a row of x.chunk_sum

  Int8Tile(const TiledWeight& w_, const QuantizedRows& x_, void* memory, int64_t row, const TilePanels& panels_)
      : w(w_),
        x(x_),
        scratch(memory),
        row_begin(row),
        panels(panels_),
        codes(),
        corrected(x_.zero_point != 0),
        chunks(w_.shape.groups() * chunks_per_group(w_.shape)) {}
};

// What a row tile asks memory for while it computes: `count` streams of packed codes, `step` bytes of each per quad.
struct Ahead {
  const uint8_t* streams[kMaxPanels];
  int count;
  int64_t step, offset;
};

// acc += codes . a over `units` units. Range is the width that bounds the codes' values, Bits the one of their layout.
template <int Bits, int Range, int Rows, int Panels>
HALFBYTE_INLINE void dot_units(const PanelCodes& codes, int64_t offset, const int8_t* a, int64_t a_stride,
                               int64_t a_step, int64_t units, Ahead& ahead, I32x16 (&acc)[Rows][Panels]) {
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
  const auto unit_step = [&](auto first_set) __attribute__((always_inline)) {
    if constexpr (Bits == 8) {
      for (int i = 0; i < ahead.count; ++i) prefetch(ahead.streams[i] + ahead.offset);
      ahead.offset += ahead.step;
    } else {
      unroll<Panels>([&](auto p) {
        unroll<unit_bytes(Bits) / 64>([&](auto line) { prefetch(codes[p] + offset + kAheadBytes + 64 * line); });
      });
    }
    unroll<kQuads>([&](auto q) { quad_step(q, Int<(q + first_set) % kSets>{}); });
    offset += unit_bytes(Bits), a += a_step;
  };
  if constexpr (kQuads == 1 && kSets == 2) {
    for (; units >= 2; units -= 2) {
      unit_step(Int<0>{});
      unit_step(Int<1>{});
    }
  }
  for (; units > 0; --units) unit_step(Int<0>{});
  unroll<Rows>([&](auto r) {
    unroll<Panels>([&](auto p) {
      acc[r][p] = sets[0][r][p];
      if constexpr (kSets == 2) acc[r][p] = add_i32(acc[r][p], sets[1][r][p]);
    });
  });
}

inline bool is_binary(const TiledWeight& w) { return w.shape.bits == 1 && w.zero_point == nullptr; }

#ifdef HALFBYTE_NARROW_SUMS
// The same for 8-bit layouts whose codes are small enough to sum several quads in 16 bits.
template <int Range, int Rows, int Panels>
HALFBYTE_INLINE void dot_narrow_units(const PanelCodes& codes, int64_t offset, const int8_t* a, int64_t a_stride,
                                      int64_t units, Ahead& ahead, I32x16 (&acc)[Rows][Panels]) {
  constexpr int kQuads = narrow_quads(Range);
  using Sums = decltype(no_narrow_sums());
  const auto quad_step = [&](Sums(&sums)[Rows][Panels]) __attribute__((always_inline)) {
    for (int i = 0; i < ahead.count; ++i) prefetch(ahead.streams[i] + ahead.offset);
    ahead.offset += ahead.step;
    unroll<Panels>([&](auto p) {
      const U8x64 row = load_row(codes[p] + offset);
      unroll<Rows>([&](auto r) { sums[r][p] = dot_narrow(sums[r][p], row, load_quad<Range>(a + r * a_stride)); });
    });
    offset += unit_bytes(8), a += k_unit(8);
  };
  while (units > 0) {
    Sums sums[Rows][Panels];
    unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { sums[r][p] = no_narrow_sums(); }); });
    if (units >= kQuads) {
      unroll<kQuads>([&](auto) { quad_step(sums); });
    } else {
      for (int64_t unit = 0; unit < units; ++unit) quad_step(sums);
    }
    units -= kQuads;
    unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { acc[r][p] = widen(acc[r][p], sums[r][p]); }); });
  }
}
#endif

HALFBYTE_INLINE int32_t center_of(const TiledWeight& w) { return is_binary(w) ? 1 : 1 << (w.shape.bits - 1); }

// What t (matmul.h) takes off m * dot where activations have a zero point: z*sum(a) + za*(m*sum(u) - n*z) into
// offsets[rows][panels][16]. Never inlined: it would cost the row tiles their registers.
[[gnu::noinline]] void load_offsets(const Int8Tile& t, int64_t row, int64_t rows, int64_t panels,
                                    const Segment& segment, int32_t* offsets) {
  const TileShape& shape = t.w.shape;
  const int64_t in_group = (segment.chunk % chunks_per_group(shape)) * kMaxChunk;
  const int64_t group_inputs = std::min(shape.group_size, shape.in_features - segment.group * shape.group_size);
  const auto inputs = static_cast<int32_t>(std::clamp<int64_t>(group_inputs - in_group, 0, kMaxChunk));
  for (int64_t p = 0; p < panels; ++p) {
    I32x16 zero = set_i32(center_of(t.w));
    if (t.w.zero_point != nullptr) zero = load_zero_points(t.w, segment.group, t.panels.index[p]);
    I32x16 correction = set_i32(0);
    if (t.corrected) {
      I32x16 sum = load_i32(t.scratch.column_sum + (segment.chunk * panels + p) * kPanel);
      if (is_binary(t.w)) sum = add_i32(sum, sum);
      correction = mul_i32(set_i32(t.x.zero_point), sub_i32(sum, mul_i32(set_i32(inputs), zero)));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const I32x16 sum = set_i32(t.x.chunk_sum[(row + r) * t.chunks + segment.chunk]);
      store_i32(offsets + (r * panels + p) * kPanel, add_i32(mul_i32(zero, sum), correction));
    }
  }
}

// The sums of a chunk begin at -z*sum(a), so that its end has nothing to take off. Not so where that is no multiple of
// m, or not all of it.
template <int Rows, int Panels>
HALFBYTE_INLINE void begin_chunk(const Int8Tile& t, int64_t row, const Segment& segment, I32x16 (&dots)[Rows][Panels]) {
  const bool at_end = t.corrected || is_binary(t.w);
  const int32_t* sum = t.x.chunk_sum + row * t.chunks + segment.chunk;
  if (t.w.zero_point == nullptr || at_end) {
    const int32_t center = at_end ? 0 : -center_of(t.w);
    unroll<Rows>([&](auto r) {
      const I32x16 from = set_i32(center * sum[r * t.chunks]);
      unroll<Panels>([&](auto p) { dots[r][p] = from; });
    });
  } else {
    unroll<Panels>([&](auto p) {
      const I32x16 zero = sub_i32(set_i32(0), load_zero_points(t.w, segment.group, t.panels.index[p]));
      unroll<Rows>([&](auto r) { dots[r][p] = mul_i32(zero, set_i32(sum[r * t.chunks])); });
    });
  }
}

// dots = t, from what `begin_chunk` and the products made of them.
template <int Rows, int Panels>
HALFBYTE_INLINE void end_chunk(const Int8Tile& t, int64_t row, const Segment& segment, I32x16 (&dots)[Rows][Panels]) {
  const bool binary = is_binary(t.w);
  if (!t.corrected && !binary) return;
  if (binary) {
    unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { dots[r][p] = add_i32(dots[r][p], dots[r][p]); }); });
  }
  if (t.corrected) {
    int32_t offsets[Rows][Panels][kPanel];
    load_offsets(t, row, Rows, Panels, segment, offsets[0][0]);
    unroll<Rows>(
        [&](auto r) { unroll<Panels>([&](auto p) { dots[r][p] = sub_i32(dots[r][p], load_i32(offsets[r][p])); }); });
  } else {
    const int32_t* sum = t.x.chunk_sum + row * t.chunks + segment.chunk;
    unroll<Rows>(
        [&](auto r) { unroll<Panels>([&](auto p) { dots[r][p] = sub_i32(dots[r][p], set_i32(sum[r * t.chunks])); }); });
  }
}

// acc[row, panel] = fma(scale, float(t), acc), where `dots` holds t.
template <int Rows, int Panels>
HALFBYTE_INLINE void fold_dots(const Int8Tile& t, int64_t row, const Segment& segment,
                               const I32x16 (&dots)[Rows][Panels]) {
  float* acc = t.scratch.acc + (row - t.row_begin) * Panels * kPanel;
  unroll<Panels>([&](auto p) {
    const F32x16 scale = load_scales(t.w, segment.group, t.panels.index[p]);
    unroll<Rows>([&](auto r) {
      float* at = acc + (r * Panels + p) * kPanel;
      store_f32(at, fma_f32(scale, to_float(dots[r][p]), load_f32(at)));
    });
  });
}

// One row tile over one block of inputs.
template <int Bits, int Range, int Rows, int Panels>
void int8_row_tile(const Int8Tile& t, int64_t row, Cursor cursor, int64_t k_end, Ahead ahead) {
  const int64_t a_stride = code_stride(t.w.shape);
  int64_t offset = 0;
  const int8_t* a = t.x.codes + row * a_stride + cursor.k;
  int32_t* part = static_cast<int32_t*>(t.scratch.part) + (row - t.row_begin) * Panels * kPanel;
  while (cursor.k < k_end) {
    const Segment segment = cursor.next(k_end);
    I32x16 dots[Rows][Panels];
    if (segment.first) {
      begin_chunk<Rows, Panels>(t, row, segment, dots);
    } else {
      unroll<Rows>(
          [&](auto r) { unroll<Panels>([&](auto p) { dots[r][p] = load_i32(part + (r * Panels + p) * kPanel); }); });
    }
    const int64_t units = segment.inputs / k_unit(Bits);
    if constexpr (Bits == 8 && narrow_quads(Range) > 1) {
      dot_narrow_units<Range>(t.codes, offset, a, a_stride, units, ahead, dots);
    } else {
      dot_units<Bits, Range>(t.codes, offset, a, a_stride, k_unit(Bits), units, ahead, dots);
    }
    offset += units * unit_bytes(Bits);
    a += segment.inputs;
    if (segment.last) {
      end_chunk<Rows, Panels>(t, row, segment, dots);
      fold_dots<Rows, Panels>(t, row, segment, dots);
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
  Ahead nothing = {};
  for (Cursor cursor(t.w.shape, kMaxChunk); cursor.k < t.w.shape.padded_in();) {
    const Segment segment = cursor.next(t.w.shape.padded_in());
    I32x16 sums[1][Panels];
    unroll<Panels>([&](auto p) { sums[0][p] = set_i32(0); });
    const int64_t units = segment.inputs / k_unit(Bits);
    dot_units<Bits, Bits>(t.codes, offset, kOnes, 0, 0, units, nothing, sums);
    offset += units * unit_bytes(Bits);
    unroll<Panels>(
        [&](auto p) { store_i32(t.scratch.column_sum + (segment.chunk * Panels + p) * kPanel, sums[0][p]); });
  }
}

constexpr int64_t kBlockInputs = kBlockBytes / (kPanel * kTilePanels);

using Int8RowTile = void (*)(const Int8Tile&, int64_t row, Cursor, int64_t k_end, Ahead);

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

// Calls f(row tiles): those of the 8-bit layout for codes below 2^bits.
template <class F>
HALFBYTE_INLINE void with_row_tiles(int bits, F&& f) {
#ifdef HALFBYTE_NARROW_SUMS
  static constexpr Int8RowTiles<8, 4, kNarrowTileRows, kTilePanels> kFourBits;
  static constexpr Int8RowTiles<8, 5, kNarrowTileRows, kTilePanels> kFiveBits;
  if (bits <= 4) return f(kFourBits.of_rows);
  if (bits == 5) return f(kFiveBits.of_rows);
#endif
  static constexpr Int8RowTiles<8, 8, kTileRows, kTilePanels> kWide;
  static constexpr Int8RowTiles<8, 7, kTileRows, kTilePanels> kNarrow;
  if (bits == 8) return f(kWide.of_rows);
  f(kNarrow.of_rows);
}

// Inputs of a block: equal ones rather than full ones and a remainder. Codes of 8 bits are used where they lie; one row
// tile reads them just once, and a few KB more than the L1 cache cost less than to store and reload unfinished sums.
inline int64_t block_inputs(const TileShape& shape, int64_t rows) {
  const int64_t all = shape.padded_in();
  if (all <= kBlockInputs || (shape.bits == 8 && (rows <= kTileRows || all <= 2 * kBlockInputs))) return all;
  constexpr int64_t kStep = 32;  // any width's unit
  return ceil_div(ceil_div(all, ceil_div(all, kBlockInputs)), kStep) * kStep;
}

// All of K for a tile of many rows, block by block. While it works on one block, the row tiles ask memory for the next.
void int8_blocked(Int8Tile& t, int64_t rows) {
  constexpr int64_t kBlock = kBlockInputs;
  const TileShape& shape = t.w.shape;
  const int bits = shape.bits;
  const int64_t block = block_inputs(shape, rows);
  const bool read_once = bits == 8 && rows <= kTileRows;  // which the hardware foresees: prefetches cost 5 to 15 %
  for (Cursor cursor(shape, kMaxChunk); cursor.k < shape.padded_in();) {
    const int64_t k_end = std::min(cursor.k + block, shape.padded_in());
    locate_codes(t.w, t.panels, kTilePanels, cursor.k, t.codes);
    Ahead ahead = {.streams = {}, .count = 0, .step = 8 * bits, .offset = 0};
    const int64_t panel_bytes = shape.panel_bytes();
    for (int64_t p = 0; p < kTilePanels; ++p) {
      if (k_end < shape.padded_in()) {
        ahead.streams[p] = t.codes[p] + (k_end - cursor.k) * kPanel * bits / 8;
      } else {  // the first block of the panels that follow
        ahead.streams[p] = t.w.codes + (t.panels.index[p] + kTilePanels) * panel_bytes;
      }
    }
    if (bits < 8) {
      with_bits(bits, [&](auto width) {
        for (int64_t p = 0; p < t.panels.present; ++p) {
          unpack_units<width>(t.codes[p], (k_end - cursor.k) / k_unit(width), t.scratch.block + p * kBlock * kPanel);
        }
      });
      for (int64_t p = 0; p < kTilePanels; ++p) {
        t.codes[p] = t.scratch.block + std::min(p, t.panels.present - 1) * kBlock * kPanel;
      }
    }
    // The panels' streams are dealt out evenly over the row tiles.
    with_row_tiles(bits, [&]<size_t Rows>(const Int8RowTile(&tiles)[Rows]) {
      const auto count = static_cast<int>(ceil_div(rows, static_cast<int64_t>(Rows)));
      int tile = 0;
      run_row_tiles(tiles, rows, [&](Int8RowTile run, int64_t r) {
        Ahead part = ahead;
        const int begin = tile * kTilePanels / count, end = ++tile * kTilePanels / count;
        part.count = read_once ? 0 : end - begin;
        for (int i = 0; i < part.count; ++i) part.streams[i] = ahead.streams[begin + i];
        run(t, t.row_begin + r, cursor, k_end, part);
      });
    });
    while (cursor.k < k_end) cursor.next(k_end);
  }
}

void int8_tile(Int8Tile& t, int64_t rows) {
  const TileShape& shape = t.w.shape;
  std::fill_n(t.scratch.acc, rows * kTilePanels * kPanel, 0.0f);
  with_bits(shape.bits, [&](auto bits) {
    locate_codes(t.w, t.panels, kTilePanels, 0, t.codes);
    if (t.corrected) sum_columns<bits, kTilePanels>(t);
    if constexpr (bits < 8 && direct_rows(bits) > 0) {
      if (rows <= direct_rows(bits)) {
        static constexpr Int8RowTiles<bits, bits, direct_rows(bits), kTilePanels> kDirect;
        return kDirect.of_rows[rows - 1](t, t.row_begin, Cursor(shape, kMaxChunk), shape.padded_in(), {});
      }
    }
    int8_blocked(t, rows);
  });
}

// y = s_i * acc + bias for the rows of a slab.
template <int Panels>
void store_int8_tile(const Int8Tile& t, int64_t rows, const float* bias, float* y, int64_t ldy) {
  const auto finish = [&](F32x16 acc, int64_t r, F32x16 b) {
    const F32x16 scale = set_f32(t.x.scale[t.row_begin + r]);
    return bias == nullptr ? mul_f32(scale, acc) : fma_f32(scale, acc, b);
  };
  store_tile<Panels>(t.w.shape, t.panels, t.scratch.acc, rows, bias, y + t.row_begin * ldy, ldy, finish);
}

void matmul_int8(const TiledWeight& w, const QuantizedRows& x, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                 int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch) {
  run_slabs(row_begin, row_end, kSlabRows, [&](int64_t row, int64_t rows) {
    for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
      Int8Tile t(w, x, scratch, row, TilePanels(panel, panel_end, kTilePanels));
      int8_tile(t, rows);
      store_int8_tile<kTilePanels>(t, rows, bias, y, ldy);
    }
  });
}

}  // namespace
}  // namespace halfbyte
