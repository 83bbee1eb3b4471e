// The two documented layouts of low-bit codes. Both are independent of the CPU and are what files hold.
//
// A code is an unsigned integer u in [0, 2^bits): u = q for unsigned formats, u = q + 2^(bits-1) for signed ones.
// A width is stored as *planes* of 8, 4, 2 or 1 bits, so no code straddles a byte:
//   8 = 8   7 = 4+2+1   6 = 4+2   5 = 4+1   4 = 4   3 = 2+1   2 = 2   1 = 1     (low bits of u in the first plane)
//
// rows:  last dimension packed on its own. For each plane of p bits, ceil(I*p/8) bytes; element i sits in byte i*p/8 at
//        bit (i*p)%8. A row is its planes one after another. Used by embeddings and by anything that gathers rows.
// tiles: a weight [O, I] for matrix products. Panels of 16 outputs; in a panel, K is cut into units of `k_unit(bits)`
//        inputs, and each group of the format is padded (code 0) to whole units. A plane of p bits holds, per 64-byte
//        row, 16 outputs x 4 inputs x (8/p) consecutive quads of inputs: byte c*4 + j has, at bit p*t, the code of
//        output 16*panel + c, input k + 4*t + j. A unit is its planes one after another: 16*k_unit*bits/8 bytes.
//        Outputs past O have code 0. Shape [panels, units * unit_bytes].
#pragma once
#include <initializer_list>

#include "halfbyte/types.h"

namespace halfbyte {

constexpr int64_t kPanel = 16;  // outputs in one panel of the tiles layout

// Inputs in one unit of the tiles layout.
static constexpr int64_t k_unit(int bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32; }
static constexpr int64_t unit_bytes(int bits) { return kPanel * k_unit(bits) * bits / 8; }

// Calls f(plane_bits, shift) for each plane of a width, low bits first.
template <class F>
constexpr void for_each_plane(int bits, F&& f) {
  int shift = 0;
  for (int plane : {8, 4, 2, 1}) {
    if (bits & plane) {
      f(plane, shift);
      shift += plane;
    }
  }
}

static inline int64_t packed_row_bytes(int64_t length, int bits) {
  int64_t bytes = 0;
  for_each_plane(bits, [&](int plane, int) { bytes += ceil_div(length * plane, 8); });
  return bytes;
}

// Geometry of a tiles weight: everything a kernel needs to walk it.
struct TileShape {
  int64_t out_features, in_features, group_size;  // group_size == in_features for per-channel
  int bits;
  int64_t groups() const { return in_features == 0 ? 0 : ceil_div(in_features, group_size); }
  int64_t padded_group() const { return round_up(group_size, k_unit(bits)); }
  int64_t padded_in() const { return groups() * padded_group(); }  // K as the kernels see it
  int64_t panels() const { return ceil_div(out_features, kPanel); }
  int64_t group_bytes() const { return padded_group() / k_unit(bits) * unit_bytes(bits); }
  int64_t panel_bytes() const { return groups() * group_bytes(); }
};

// codes are u (offset already added, below 2^bits), one byte each, row-major. `codes` and `packed` point at the whole
// weight; the calls with a range touch only its panels, so that panels can be split over threads.
void pack_rows(const uint8_t* codes, int64_t rows, int64_t length, int bits, uint8_t* packed);
void unpack_rows(const uint8_t* packed, int64_t rows, int64_t length, int bits, uint8_t* codes);
void pack_tiles(const uint8_t* codes, const TileShape& shape, int64_t panel_begin, int64_t panel_end, uint8_t* packed);
void unpack_tiles(const uint8_t* packed, const TileShape& shape, int64_t panel_begin, int64_t panel_end,
                  uint8_t* codes);
// One row (output) of a tiles weight: what an embedding that shares its table with the output head reads.
void unpack_tile_row(const uint8_t* packed, const TileShape& shape, int64_t row, uint8_t* codes);

}  // namespace halfbyte
