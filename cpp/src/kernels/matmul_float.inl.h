// y = x Wᵀ with float32 x: codes become floats (u - c, or entries of a codebook), multiplied with inputs in order,
// folded once a group.
//
// As in matmul_int8.inl.h, few rows convert the codes in registers and more rows share a converted block in the L1
// cache.
#pragma once
#include <type_traits>

#include "tile_walk.inl.h"

namespace halfbyte {
namespace {

struct FloatTile {
  const TiledWeight& w;
  const float* x;  // padded rows
  const float* group_sum;
  Scratch scratch;
  int64_t row_begin;  // of the slab: row 0 of scratch.acc and scratch.part
  TilePanels panels;
};

// What the codes of a quad stand for, before their scale: integers u - c ...
template <int Bits>
struct IntegerCodes {
  static constexpr int kBits = Bits, kCenter = 1 << (Bits - 1);
  template <int J>
  HALFBYTE_INLINE F32x16 value(U8x64 quad) const {
    return code_to_float<Bits, J, kCenter>(quad);
  }
};
// ... or the entries of a codebook, which stays in registers.
template <int Bits>
struct CodebookCodes {
  static constexpr int kBits = Bits;
  CodeTable table;
  template <int J>
  HALFBYTE_INLINE F32x16 value(U8x64 quad) const {
    return look_up<Bits, J>(table, quad);
  }
};

// Calls f with the one that the weight has.
template <class F>
HALFBYTE_INLINE void with_codes(const TiledWeight& w, F&& f) {
  if (w.codebook == nullptr) return with_bits(w.shape.bits, [&](auto bits) { f(IntegerCodes<bits>()); });
  const CodeTable table = load_table(w.codebook);
  switch (w.shape.bits) {
    case 1:
      return f(CodebookCodes<1>{table});
    case 2:
      return f(CodebookCodes<2>{table});
    case 3:
      return f(CodebookCodes<3>{table});
    default:
      return f(CodebookCodes<4>{table});
  }
}

// Register tile of the blocked path: as the integer one, but without its operands for 16-bit products.
constexpr int kFloatTileRows = 6;

// acc[row, panel] folds the group's products p.
template <int Rows, int Panels>
HALFBYTE_INLINE void fold_group(const FloatTile& t, int64_t row, const Segment& segment,
                                const F32x16 (&products)[Rows][Panels]) {
  const TileShape& shape = t.w.shape;
  const bool binary = shape.bits == 1 && t.w.zero_point == nullptr && t.w.codebook == nullptr;
  const int64_t groups = shape.groups();
  const float* group_sum = t.group_sum + row * groups + segment.group;
  float* acc = t.scratch.acc + (row - t.row_begin) * Panels * kPanel;
  unroll<Panels>([&](auto p) {
    const F32x16 scale = load_scales(t.w, segment.group, t.panels.index[p]);
    F32x16 offset = set_f32(0.0f);
    if (t.w.zero_point != nullptr) {
      offset =
          to_float(sub_i32(set_i32(1 << (shape.bits - 1)), load_zero_points(t.w, segment.group, t.panels.index[p])));
    }
    unroll<Rows>([&](auto r) {
      F32x16 sum = products[r][p];
      if (t.w.zero_point != nullptr) sum = fma_f32(offset, set_f32(group_sum[r * groups]), sum);
      if (binary) sum = fma_f32(set_f32(2.0f), sum, set_f32(group_sum[r * groups]));
      float* at = acc + (r * Panels + p) * kPanel;
      store_f32(at, fma_f32(scale, sum, load_f32(at)));
    });
  });
}

// Loops sum in an array of their own: through a reference, some compilers store every sum at every step.
template <int Rows, int Panels>
HALFBYTE_INLINE void copy_tile(const F32x16 (&from)[Rows][Panels], F32x16 (&to)[Rows][Panels]) {
  unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { to[r][p] = from[r][p]; }); });
}

// Runs `accumulate(products, inputs)` over the segments of a block, carrying and folding the products of one row tile.
template <int Rows, int Panels, class Accumulate>
HALFBYTE_INLINE void float_row_tile(const FloatTile& t, int64_t row, Cursor cursor, int64_t k_end,
                                    Accumulate&& accumulate) {
  float* part = static_cast<float*>(t.scratch.part) + (row - t.row_begin) * Panels * kPanel;
  while (cursor.k < k_end) {
    const Segment segment = cursor.next(k_end);
    F32x16 products[Rows][Panels];
    unroll<Rows>([&](auto r) {
      unroll<Panels>(
          [&](auto p) { products[r][p] = segment.first ? set_f32(0.0f) : load_f32(part + (r * Panels + p) * kPanel); });
    });
    accumulate(products, segment.inputs);
    if (segment.last) {
      fold_group(t, row, segment, products);
    } else {
      unroll<Rows>([&](auto r) {
        unroll<Panels>([&](auto p) { store_f32(part + (r * Panels + p) * kPanel, products[r][p]); });
      });
    }
  }
}

// The whole of K for up to float_direct_rows() rows, converting in registers.
template <class Codes, int Rows, int Panels>
void float_direct(const FloatTile& t, const Codes& values) {
  constexpr int Bits = Codes::kBits;
  const TileShape& shape = t.w.shape;
  const int64_t x_stride = float_stride(shape);
  const float* x = t.x + t.row_begin * x_stride;
  PanelCodes codes;
  locate_codes(t.w, t.panels, Panels, 0, codes);
  int64_t offset = 0;
  float_row_tile<Rows, Panels>(t, t.row_begin, Cursor(shape, shape.padded_group()), shape.padded_in(),
                               [&](F32x16(&products)[Rows][Panels], int64_t inputs) __attribute__((always_inline)) {
                                 F32x16 sums[Rows][Panels];
                                 copy_tile(products, sums);
                                 for (int64_t unit = 0; unit < inputs / k_unit(Bits); ++unit) {
                                   unroll<kQuadsPerUnit<Bits>>([&](auto q) {
                                     U8x64 quads[Panels];
                                     unroll<Panels>([&](auto p) { quads[p] = quad_codes<Bits, q>(codes[p] + offset); });
                                     unroll<4>([&](auto j) {
                                       unroll<Panels>([&](auto p) {
                                         const F32x16 w = values.template value<j>(quads[p]);
                                         unroll<Rows>([&](auto r) {
                                           sums[r][p] = fma_f32(set_f32(x[r * x_stride + 4 * q + j]), w, sums[r][p]);
                                         });
                                       });
                                     });
                                   });
                                   offset += unit_bytes(Bits), x += k_unit(Bits);
                                 }
                                 copy_tile(sums, products);
                               });
}

// A block of codes as floats: [input][panel][16].
template <class Codes, int Panels>
void convert_block(const Codes& values, const PanelCodes& codes, int64_t units, float* block) {
  constexpr int Bits = Codes::kBits;
  int64_t offset = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    unroll<kQuadsPerUnit<Bits>>([&](auto q) {
      unroll<Panels>([&](auto p) {
        const U8x64 quad = quad_codes<Bits, q>(codes[p] + offset);
        unroll<4>(
            [&](auto j) { store_f32(block + ((4 * q + j) * Panels + p) * kPanel, values.template value<j>(quad)); });
      });
    });
    offset += unit_bytes(Bits), block += k_unit(Bits) * Panels * kPanel;
  }
}

template <int Rows, int Panels>
void float_block(const FloatTile& t, int64_t row, Cursor cursor, int64_t k_end) {
  const int64_t x_stride = float_stride(t.w.shape);
  const float* x = t.x + row * x_stride + cursor.k;
  const auto* block = reinterpret_cast<const float*>(t.scratch.block);
  float_row_tile<Rows, Panels>(t, row, cursor, k_end,
                               [&](F32x16(&products)[Rows][Panels], int64_t inputs) __attribute__((always_inline)) {
                                 F32x16 sums[Rows][Panels];
                                 copy_tile(products, sums);
                                 for (int64_t k = 0; k < inputs; ++k) {
                                   F32x16 w[Panels];
                                   unroll<Panels>([&](auto p) { w[p] = load_f32(block + p * kPanel); });
                                   unroll<Rows>([&](auto r) {
                                     const F32x16 value = set_f32(x[r * x_stride]);
                                     unroll<Panels>([&](auto p) { sums[r][p] = fma_f32(value, w[p], sums[r][p]); });
                                   });
                                   ++x, block += Panels * kPanel;
                                 }
                                 copy_tile(sums, products);
                               });
}

void float_blocked(const FloatTile& t, int64_t rows) {
  using RowTile = void (*)(const FloatTile&, int64_t, Cursor, int64_t);
  static constexpr RowTile kTiles[] = {float_block<1, kTilePanels>, float_block<2, kTilePanels>,
                                       float_block<3, kTilePanels>, float_block<4, kTilePanels>,
                                       float_block<5, kTilePanels>, float_block<6, kTilePanels>};
  constexpr int64_t kBlock = kBlockBytes / (4 * kPanel * kTilePanels);
  const TileShape& shape = t.w.shape;
  for (Cursor cursor(shape, shape.padded_group()); cursor.k < shape.padded_in();) {
    const int64_t k_end = std::min(cursor.k + kBlock, shape.padded_in());
    PanelCodes codes;
    locate_codes(t.w, t.panels, kTilePanels, cursor.k, codes);
    with_codes(t.w, [&](const auto& values) {
      convert_block<std::decay_t<decltype(values)>, kTilePanels>(values, codes, (k_end - cursor.k) / k_unit(shape.bits),
                                                                 reinterpret_cast<float*>(t.scratch.block));
    });
    run_row_tiles(kTiles, rows, [&](RowTile run, int64_t r) { run(t, t.row_begin + r, cursor, k_end); });
    while (cursor.k < k_end) cursor.next(k_end);
  }
}

template <int Panels>
void store_float_tile(const FloatTile& t, int64_t rows, const float* bias, float* y, int64_t ldy) {
  store_tile<Panels>(t.w.shape, t.panels, t.scratch.acc, rows, bias, y + t.row_begin * ldy, ldy,
                     [&](F32x16 acc, int64_t, F32x16 b) { return bias == nullptr ? acc : add_f32(acc, b); });
}

// Panels of a direct tile: enough chains of products to hide the latency of one, as long as registers last.
constexpr int direct_panels(int rows) { return std::clamp(kDirectAccumulators / rows, 1, kMaxPanels); }

template <class Codes, int Rows>
void float_direct_tiles(FloatTile& t, const Codes& values, int64_t panel_begin, int64_t panel_end, const float* bias,
                        float* y, int64_t ldy) {
  constexpr int kPanels = direct_panels(Rows);
  for (int64_t panel = panel_begin; panel < panel_end; panel += kPanels) {
    t.panels = TilePanels(panel, panel_end, kPanels);
    std::fill_n(t.scratch.acc, Rows * kPanels * kPanel, 0.0f);
    float_direct<Codes, Rows, kPanels>(t, values);
    store_float_tile<kPanels>(t, Rows, bias, y, ldy);
  }
}

void matmul_float(const TiledWeight& w, const float* x, const float* group_sum, int64_t row_begin, int64_t row_end,
                  int64_t panel_begin, int64_t panel_end, const float* bias, float* y, int64_t ldy, void* scratch) {
  run_slabs(row_begin, row_end, kSlabRows, [&](int64_t row, int64_t rows) {
    FloatTile t = {w, x, group_sum, Scratch(scratch), row, TilePanels(panel_begin, panel_end, kTilePanels)};
    with_codes(w, [&](const auto& values) {
      using Codes = std::decay_t<decltype(values)>;
      constexpr int kMostRows = float_direct_rows(Codes::kBits);
      if constexpr (kMostRows > 0) {
        if (rows <= kMostRows) {
          [&]<int... R>(std::integer_sequence<int, R...>) {
            using Direct = void (*)(FloatTile&, const Codes&, int64_t, int64_t, const float*, float*, int64_t);
            static constexpr Direct kDirect[] = {float_direct_tiles<Codes, R + 1>...};
            kDirect[rows - 1](t, values, panel_begin, panel_end, bias, y, ldy);
          }(std::make_integer_sequence<int, kMostRows>{});
          return;
        }
      }
      for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
        t.panels = TilePanels(panel, panel_end, kTilePanels);
        std::fill_n(t.scratch.acc, rows * kTilePanels * kPanel, 0.0f);
        float_blocked(t, rows);
        store_float_tile<kTilePanels>(t, rows, bias, y, ldy);
      }
    });
  });
}

}  // namespace
}  // namespace halfbyte
