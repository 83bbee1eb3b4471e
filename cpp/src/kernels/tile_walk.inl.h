// What every kernel over the tiles layout shares: compile-time loops, the codes of a quad from its planes, the walk
// over groups and chunks, and reads and writes of partial panels.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "halfbyte/matmul.h"

namespace halfbyte {
namespace {

template <int I>
using Int = std::integral_constant<int, I>;

// f(Int<0>) ... f(Int<N-1>): unrolled before the optimizer runs, so that arrays of accumulators become registers.
template <int N, class F>
HALFBYTE_INLINE void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { (f(Int<I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

template <int Bits>
constexpr int kQuadsPerUnit = static_cast<int>(k_unit(Bits) / 4);

// Bits of plane `Plane` of quad Q, in place. The planes before it hold the low bits of the width: `Bits` without the
// bits below them is both how many those are and, times k_unit / 32, how many 64-byte rows they take.
template <int Bits, int Plane, int Q>
HALFBYTE_INLINE U8x64 plane_codes(const uint8_t* unit) {
  constexpr int kShift = Bits & ~(2 * Plane - 1);
  constexpr int kFirstRow = static_cast<int>(k_unit(Bits)) * kShift / 32;
  constexpr int kPerByte = 8 / Plane;
  constexpr int kMask = ((1 << Plane) - 1) << kShift;
  return shift_and<Plane*(Q % kPerByte) - kShift, kMask>(load_row(unit + 64 * (kFirstRow + Q / kPerByte)));
}

// Codes of quad Q of a unit: 16 outputs x 4 inputs, one byte each.
template <int Bits, int Q>
HALFBYTE_INLINE U8x64 quad_codes(const uint8_t* unit) {
  if constexpr (Bits == 8) {
    return load_row(unit);
  } else if constexpr (Bits == 4 || Bits == 2 || Bits == 1) {
    return plane_codes<Bits, Bits, Q>(unit);
  } else if constexpr (Bits == 7) {
    return or_rows(or_rows(plane_codes<7, 4, Q>(unit), plane_codes<7, 2, Q>(unit)), plane_codes<7, 1, Q>(unit));
  } else {
    constexpr int kHigh = Bits == 3 ? 2 : 4;
    return or_rows(plane_codes<Bits, kHigh, Q>(unit), plane_codes<Bits, Bits - kHigh, Q>(unit));
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

// Calls f(Int<bits>) for a width known at run time.
template <class F>
HALFBYTE_INLINE auto with_bits(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f(Int<1>{});
    case 2:
      return f(Int<2>{});
    case 3:
      return f(Int<3>{});
    case 4:
      return f(Int<4>{});
    case 5:
      return f(Int<5>{});
    case 6:
      return f(Int<6>{});
    case 7:
      return f(Int<7>{});
    default:
      return f(Int<8>{});
  }
}

// A run of inputs inside one chunk of one group.
struct Segment {
  int64_t inputs;  // padded
  int64_t group;
  int64_t chunk;     // counted over all groups
  bool first, last;  // of its chunk
};

// Walks K (padded) in segments; copies are cheap, so that every row tile walks the same block again.
struct Cursor {
  int64_t padded_group, chunk_size;
  int64_t k = 0, group = 0, in_group = 0, chunk = 0, in_chunk = 0;

  Cursor(const TileShape& shape, int64_t chunk_size_)
      : padded_group(shape.padded_group()), chunk_size(std::min(chunk_size_, padded_group)) {}

  Segment next(int64_t k_end) {
    const int64_t chunk_end = std::min(chunk_size, padded_group - (in_group - in_chunk));
    const int64_t inputs = std::min(chunk_end - in_chunk, k_end - k);
    const Segment segment = {inputs, group, chunk, in_chunk == 0, in_chunk + inputs == chunk_end};
    k += inputs, in_group += inputs, in_chunk += inputs;
    if (segment.last) ++chunk, in_chunk = 0;
    if (in_group == padded_group) ++group, in_group = 0;
    return segment;
  }
};

// 16 elements of which only the first `count` may be touched; the others read as 0.
template <class T, class Load>
HALFBYTE_INLINE auto load_partial(const T* p, int64_t count, Load&& load) {
  if (count >= kPanel) return load(p);
  T whole[kPanel] = {};
  std::memcpy(whole, p, static_cast<size_t>(count) * sizeof(T));
  return load(whole);
}
HALFBYTE_INLINE void store_partial(float* p, F32x16 x, int64_t count) {
  if (count >= kPanel) return store_f32(p, x);
  float whole[kPanel];
  store_f32(whole, x);
  std::memcpy(p, whole, static_cast<size_t>(count) * sizeof(float));
}

HALFBYTE_INLINE int64_t outputs_in_panel(const TileShape& shape, int64_t panel) {
  return std::min(kPanel, shape.out_features - panel * kPanel);
}

// Scales and zero points of one panel in one group.
HALFBYTE_INLINE F32x16 load_scales(const TiledWeight& w, int64_t group, int64_t panel) {
  const int64_t at = group * w.shape.out_features + panel * kPanel, count = outputs_in_panel(w.shape, panel);
  if (w.scale_type == FloatType::kFloat32) {
    return load_partial(static_cast<const float*>(w.scale) + at, count, [](const float* p) { return load_f32(p); });
  }
  const auto* half = static_cast<const uint16_t*>(w.scale) + at;
  if (w.scale_type == FloatType::kFloat16) {
    return load_partial(half, count, [](const uint16_t* p) { return load_f16(p); });
  }
  return load_partial(half, count, [](const uint16_t* p) { return load_bf16(p); });
}
HALFBYTE_INLINE I32x16 load_zero_points(const TiledWeight& w, int64_t group, int64_t panel) {
  const int64_t at = group * w.shape.out_features + panel * kPanel, count = outputs_in_panel(w.shape, panel);
  return load_partial(w.zero_point + at, count, [](const uint8_t* p) { return load_u8_to_i32(p); });
}

// Calls run(kernel, first row) for the row tiles of a slab: tiles of equal height rather than full ones and a
// remainder. `tiles[n - 1]` is the kernel of n rows.
template <class Kernel, size_t Max, class Run>
HALFBYTE_INLINE void run_row_tiles(const Kernel (&tiles)[Max], int64_t rows, Run&& run) {
  const int64_t count = ceil_div(rows, static_cast<int64_t>(Max));
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t begin = tile * rows / count, end = (tile + 1) * rows / count;
    run(tiles[end - begin - 1], begin);
  }
}

// Calls run(first row, rows) for slabs of equal height.
template <class Run>
HALFBYTE_INLINE void run_slabs(int64_t row_begin, int64_t row_end, int64_t most, Run&& run) {
  const int64_t rows = row_end - row_begin, count = ceil_div(rows, most);
  for (int64_t slab = 0; slab < count; ++slab) {
    const int64_t begin = slab * rows / count, end = (slab + 1) * rows / count;
    run(row_begin + begin, end - begin);
  }
}

// Scratch of one product over a slab of rows and a tile of panels.
constexpr int kMaxPanels = 4;              // panels of the widest tile
constexpr int64_t kSlabRows = 384;         // most rows that share one pass over the weights
constexpr int64_t kBlockBytes = 32 << 10;  // unpacked codes of a tile and a block of inputs: most of the L1 cache
constexpr int64_t kAheadBytes = 2048;      // how far ahead of its own reading a tile that reads memory directly asks

struct Scratch {
  uint8_t* block;       // [kBlockBytes]
  float* acc;           // [kSlabRows, tile width]: over the chunks so far
  void* part;           // the same in the chunk that is not complete yet: int32 or float
  int32_t* column_sum;  // [chunks, tile width]: sum(u), for activations with a zero point

  static constexpr int64_t kStateBytes = kSlabRows * kMaxPanels * kPanel * 4;
  explicit Scratch(void* memory) {
    block = static_cast<uint8_t*>(memory);
    acc = reinterpret_cast<float*>(block + kBlockBytes);
    part = block + kBlockBytes + kStateBytes;
    column_sum = reinterpret_cast<int32_t*>(block + kBlockBytes + 2 * kStateBytes);
  }
  static int64_t bytes(const TileShape& shape) {
    return kBlockBytes + 2 * kStateBytes + shape.groups() * chunks_per_group(shape) * kMaxPanels * kPanel * 4;
  }
};

// The panels of a tile. One that would lie past the end repeats the last one instead: computed again, never stored.
struct TilePanels {
  int64_t index[kMaxPanels];
  int64_t present;

  TilePanels(int64_t first, int64_t panel_end, int64_t width) : index(), present(std::min(width, panel_end - first)) {
    for (int64_t p = 0; p < width; ++p) index[p] = first + std::min(p, present - 1);
  }
};

using PanelCodes = const uint8_t* [kMaxPanels];

// Where the codes of the tile's panels begin, from input `k` on.
inline void locate_codes(const TiledWeight& w, const TilePanels& panels, int64_t width, int64_t k, PanelCodes& codes) {
  const int64_t at = k / k_unit(w.shape.bits) * unit_bytes(w.shape.bits);
  for (int64_t p = 0; p < width; ++p) codes[p] = w.codes + panels.index[p] * w.shape.panel_bytes() + at;
}

// y = finish(acc, row, bias of the panel) for the rows of a slab and the panels of a tile.
template <int Panels, class Finish>
HALFBYTE_INLINE void store_tile(const TileShape& shape, const TilePanels& panels, const float* acc, int64_t rows,
                                const float* bias, float* y, int64_t ldy, Finish&& finish) {
  for (int64_t p = 0; p < panels.present; ++p) {
    const int64_t output = panels.index[p] * kPanel, count = outputs_in_panel(shape, panels.index[p]);
    const auto load = [](const float* from) { return load_f32(from); };
    const F32x16 b = bias == nullptr ? set_f32(0.0f) : load_partial(bias + output, count, load);
    for (int64_t r = 0; r < rows; ++r) {
      store_partial(y + r * ldy + output, finish(load_f32(acc + (r * Panels + p) * kPanel), r, b), count);
    }
  }
}

}  // namespace
}  // namespace halfbyte
