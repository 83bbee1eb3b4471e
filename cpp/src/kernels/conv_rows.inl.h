// Products of a convolution with one scale an output: rows are read where they lie in the channels-last codes, each tap
// a segment of its own, or gathered where a segment would not be whole quads.
//
// Register tile: conv_tile_rows(Panels) rows x Panels panels over all inputs, 64 codes of a panel with 4 activations of
// a row at a time, no intermediate sums in memory. Bound by the dot products; weights stream from the L2 cache, at
// 64 * Panels bytes for Rows * Panels products of 64.
#pragma once
#include "conv_layout.inl.h"

namespace halfbyte {
namespace {

// Rows of the tile that keeps about as many accumulators as the product of matrices does.
constexpr int conv_tile_rows(int panels) {
  constexpr int kAccumulators = kTileRows * kTilePanels;
  return panels == kTilePanels ? kTileRows : std::min(kAccumulators / panels, 12);
}

// The rows of one run of output pixels in one group of channels.
struct ConvRows {
  const int8_t** segments;      // [count, rows]: where the inputs of each row begin
  int32_t* sum;                 // [rows]: sum(a)
  int64_t rows, count, inputs;  // inputs of a segment, whole quads
};

// Qparams of the panels of a tile, ready for the epilogue.
struct ConvColumns {
  float scale[kMaxPanels * kPanel], bias[kMaxPanels * kPanel];
  int32_t zero[kMaxPanels * kPanel], correction[kMaxPanels * kPanel];
};

struct ConvTile {
  const ConvRows& rows;
  const ConvResults& y;
  const uint8_t* codes;  // 8-bit quads of the first panel
  int64_t panel_bytes;
  const ConvColumns& columns;
  float act_scale;
  int64_t first_output;  // of the tile's first panel
  int64_t begin, end;    // outputs that are stored
  int64_t pixel;         // of row 0, counted over all samples
  bool binary, has_bias;
};

// What an epilogue has to do with the outputs of a tile: most stores are of one kind, for which registers need not
// wait.
enum class Store { kFloats, kCodes, kGeneral };

inline Store store_kind(const ConvTile& t, int64_t panels) {
  const ConvResults& y = t.y;
  const bool whole = t.first_output >= t.begin && t.first_output + panels * kPanel <= t.end;
  const bool bare = y.residual == nullptr && y.added == nullptr && y.activation == Activation::kNone;
  if (!whole || !bare || (y.floats != nullptr && y.codes != nullptr)) return Store::kGeneral;
  return y.codes == nullptr ? Store::kFloats : Store::kCodes;
}

// Range bounds the codes' values, as in matmul_int8.inl.h.
template <int Range, int Rows, int Panels>
void conv_tile(const ConvTile& t, int64_t row) {
  I32x16 acc[Rows][Panels];
  unroll<Rows>([&](auto r) { unroll<Panels>([&](auto p) { acc[r][p] = set_i32(0); }); });
  const uint8_t* w = t.codes;
  for (int64_t segment = 0; segment < t.rows.count; ++segment) {
    const int8_t* const* from = t.rows.segments + segment * t.rows.rows + row;
    const int8_t* a[Rows];
    unroll<Rows>([&](auto r) { a[r] = from[r]; });
    for (int64_t k = 0; k < t.rows.inputs; k += 4) {
      DotRow<Range> codes[Panels];
      unroll<Panels>([&](auto p) { codes[p] = dot_row<Range>(load_row(w + p * t.panel_bytes)); });
      unroll<Rows>([&](auto r) {
        const DotQuad<Range> quad = load_quad<Range>(a[r] + k);
        unroll<Panels>([&](auto p) { acc[r][p] = dot<Range>(acc[r][p], codes[p], quad); });
      });
      w += 64;
    }
  }
  const F32x16 act_scale = set_f32(t.act_scale), nothing = set_f32(0.0f);
  const Store kind = store_kind(t, Panels);
  alignas(64) float values[Rows][Panels * kPanel];
  unroll<Rows>([&](auto r) {
    const I32x16 sum = set_i32(t.rows.sum[row + r]);
    unroll<Panels>([&](auto p) {
      const int at = p * kPanel;
      I32x16 dot = t.binary ? add_i32(acc[r][p], acc[r][p]) : acc[r][p];
      dot = sub_i32(sub_i32(dot, mul_i32(load_i32(t.columns.zero + at), sum)), load_i32(t.columns.correction + at));
      const F32x16 folded = fma_f32(load_f32(t.columns.scale + at), to_float(dot), nothing);
      const F32x16 value =
          t.has_bias ? fma_f32(act_scale, folded, load_f32(t.columns.bias + at)) : mul_f32(act_scale, folded);
      const int64_t pixel = t.pixel + row + r, output = t.first_output + at;
      if (kind == Store::kCodes) {
        store_low_bytes(t.y.codes + pixel * t.y.code_stride + output, requantized(value, t.y.requantization));
      } else {
        store_f32(kind == Store::kFloats ? t.y.floats + pixel * t.y.channels + output : values[r] + at, value);
      }
    });
  });
  if (kind != Store::kGeneral) return;
  for (int64_t r = 0; r < Rows; ++r) {
    for (int64_t p = 0; p < Panels; ++p) {
      const int64_t output = t.first_output + p * kPanel;
      store_finished(t.y, t.pixel + row + r, output, std::max<int64_t>(t.begin - output, 0),
                     std::min(t.end - output, kPanel), load_f32(values[r] + p * kPanel));
    }
  }
}

// All rows of a tile of panels. The last tile of rows overlaps the one before it: its results are the same again.
template <int Range, int Panels>
void conv_all_rows(const ConvTile& t) {
  constexpr int kRows = conv_tile_rows(Panels);
  int64_t row = 0;
  if (t.rows.rows >= kRows) {
    for (; row + kRows <= t.rows.rows; row += kRows) conv_tile<Range, kRows, Panels>(t, row);
    if (row < t.rows.rows) conv_tile<Range, kRows, Panels>(t, t.rows.rows - kRows);
    return;
  }
  for (; row + 2 <= t.rows.rows; row += 2) conv_tile<Range, 2, Panels>(t, row);
  if (row < t.rows.rows) conv_tile<Range, 1, Panels>(t, row);
}

using ConvAllRows = void (*)(const ConvTile&);
template <int Range>
ConvAllRows conv_rows_of(int64_t panels) {
  if constexpr (kTilePanels > 1) {
    if (panels == 2) return conv_all_rows<Range, 2>;
    if (panels == 3) return conv_all_rows<Range, 3>;
    if (panels == 4) return conv_all_rows<Range, 4>;
  }
  return conv_all_rows<Range, 1>;
}

// Input of the first output that reads an input inside, and one past the last one, along one dimension.
struct Span {
  int64_t begin, end;
};
inline Span inside(const ConvShape& s, int dim, int64_t k) {
  const int64_t shift = k * s.dilation[dim] - s.padding[dim];  // input = output * stride + shift
  const int64_t stride = s.stride[dim];
  const int64_t begin = shift >= 0 ? 0 : ceil_div(-shift, stride);
  const int64_t past = s.in[dim] - shift;
  return {std::min(begin, s.out[dim]), std::clamp<int64_t>(past <= 0 ? 0 : ceil_div(past, stride), 0, s.out[dim])};
}

// Pointers to the inputs of one tap for the pixels [begin, end), and what they add to the sums.
inline void tap_segments(const ConvShape& s, const ConvInput& x, int64_t sample, int64_t group, int64_t tap,
                         int64_t begin, int64_t end, const int8_t* outside, const int8_t** segments, int32_t* sum) {
  const int64_t kx = tap % s.kernel[2], ky = tap / s.kernel[2] % s.kernel[1], kz = tap / s.kernel[2] / s.kernel[1];
  const int64_t channels = s.in_channels, inputs = s.group_inputs();
  const int8_t* codes = x.codes + sample * s.in_pixels() * channels + group * inputs;
  const int32_t* pixel_sum = x.pixel_sum + sample * s.in_pixels() * s.groups + group;
  const auto outside_sum = static_cast<int32_t>(x.zero_point * inputs);
  const Span columns = inside(s, 2, kx), lines = inside(s, 1, ky), planes = inside(s, 0, kz);
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t ox = pixel % s.out[2], line = pixel / s.out[2], oy = line % s.out[1], oz = line / s.out[1];
    const int64_t ox_end = std::min(s.out[2], ox + end - pixel);
    const bool out = oy < lines.begin || oy >= lines.end || oz < planes.begin || oz >= planes.end;
    const int64_t from = out ? ox_end : std::clamp(columns.begin, ox, ox_end);
    const int64_t to = out ? ox_end : std::clamp(columns.end, from, ox_end);
    int64_t o = ox;
    for (; o < from; ++o) *segments++ = outside, *sum++ += outside_sum;
    const int64_t iz = oz * s.stride[0] + kz * s.dilation[0] - s.padding[0];
    const int64_t iy = oy * s.stride[1] + ky * s.dilation[1] - s.padding[1];
    const int64_t ix = o * s.stride[2] + kx * s.dilation[2] - s.padding[2];
    const int64_t first = o < to ? (iz * s.in[1] + iy) * s.in[2] + ix : 0, step = s.stride[2];
    const int8_t* p = codes + first * channels;
    const int32_t* added = pixel_sum + first * s.groups;
    const int64_t count = to - o;
    for (int64_t i = 0; i < count; ++i) segments[i] = p + i * step * channels;
    for (int64_t i = 0; i < count; ++i) sum[i] += added[i * step * s.groups];
    segments += count, sum += count, o = to;
    for (; o < ox_end; ++o) *segments++ = outside, *sum++ += outside_sum;
    pixel += ox_end - ox;
  }
}

// Whether segments can be read in place.
bool reads_in_place(const ConvShape& s) { return !s.transposed && s.group_inputs() % 4 == 0; }

int64_t conv_scratch_bytes(const ConvShape& s, const TileShape& weight, int64_t rows) {
  const int64_t segments = reads_in_place(s) ? s.taps() : 1;
  const int64_t gathered = reads_in_place(s) ? 0 : rows * round_up(s.row_inputs(), 64) + 64;
  const int64_t pixels = reads_in_place(s) ? 0 : 4 * rows * s.taps();
  const int64_t unpacked = weight.bits == 8 ? 0 : kMaxPanels * kPanel * weight.padded_in();
  return 8 * 64 + rows * segments * 8 + rows * 4 + gathered + pixels + unpacked + round_up(s.group_inputs(), 64);
}

// Cuts parts off a buffer, each 64-byte aligned.
struct Cutter {
  std::byte* at;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

inline ConvRows in_place_rows(const ConvShape& s, const ConvInput& x, int64_t sample, int64_t group, int64_t begin,
                              int64_t end, Cutter& scratch) {
  const int64_t rows = end - begin, taps = s.taps();
  const ConvRows r = {scratch.take<const int8_t*>(taps * rows), scratch.take<int32_t>(rows), rows, taps,
                      s.group_inputs()};
  auto* outside = scratch.take<int8_t>(s.group_inputs());
  std::memset(outside, x.zero_point, static_cast<size_t>(s.group_inputs()));
  std::fill_n(r.sum, rows, 0);
  for (int64_t tap = 0; tap < taps; ++tap) {
    tap_segments(s, x, sample, group, tap, begin, end, outside, r.segments + tap * rows, r.sum);
  }
  return r;
}

inline ConvRows gathered_rows(const ConvShape& s, const ConvInput& x, int64_t sample, int64_t group, int64_t begin,
                              int64_t end, Cutter& scratch) {
  const int64_t rows = end - begin, inputs = s.group_inputs(), taps = s.taps(), stride = round_up(s.row_inputs(), 64);
  const ConvRows r = {scratch.take<const int8_t*>(rows), scratch.take<int32_t>(rows), rows, 1,
                      round_up(s.row_inputs(), 4)};
  auto* codes = scratch.take<int8_t>(rows * stride + 16);
  auto* pixels = scratch.take<int32_t>(taps * rows);
  for (int64_t tap = 0; tap < taps; ++tap) tap_pixels(s, tap, begin, end, pixels + tap * rows);
  const int8_t* from = x.codes + sample * s.in_pixels() * s.in_channels + group * inputs;
  // Where the columns of the kernel are neighbours in memory too, they are copied together.
  const bool joined = !s.transposed && s.dilation[2] == 1 && s.groups == 1;
  for (int64_t row = 0; row < rows; ++row) {
    int8_t* to = codes + row * stride;
    r.segments[row] = to;
    for (int64_t tap = 0; tap < taps;) {
      const int64_t first = pixels[tap * rows + row];
      int64_t count = 1;
      if (joined && tap % s.kernel[2] == 0) {
        const int64_t last = pixels[(tap + s.kernel[2] - 1) * rows + row];
        if (first >= 0 && last == first + s.kernel[2] - 1) count = s.kernel[2];
      }
      if (first < 0) {
        std::memset(to, x.zero_point, static_cast<size_t>(inputs));
      } else {
        std::memcpy(to, from + first * s.in_channels, static_cast<size_t>(count * inputs));
      }
      to += count * inputs, tap += count;
    }
    r.sum[row] = sum_bytes(codes + row * stride, s.row_inputs());
    std::memset(to, 0, static_cast<size_t>(r.inputs - s.row_inputs()));
  }
  return r;
}

// Qparams of the panels from `panel` on; `codes` are the 8-bit quads of the tile.
inline void load_columns(const TiledWeight& w, const TilePanels& panels, int64_t width, const uint8_t* codes,
                         int64_t panel_bytes, int64_t quads, int32_t act_zero_point, const float* bias,
                         ConvColumns& to) {
  const bool binary = w.shape.bits == 1 && w.zero_point == nullptr;
  const int32_t center = binary ? 1 : 1 << (w.shape.bits - 1);
  const auto inputs = static_cast<int32_t>(w.shape.in_features);
  for (int64_t p = 0; p < width; ++p) {
    const int64_t at = p * kPanel, output = panels.index[p] * kPanel,
                  count = outputs_in_panel(w.shape, panels.index[p]);
    const I32x16 zero = w.zero_point == nullptr ? set_i32(center) : load_zero_points(w, 0, panels.index[p]);
    store_f32(to.scale + at, load_scales(w, 0, panels.index[p]));
    store_i32(to.zero + at, zero);
    if (bias != nullptr) {
      store_f32(to.bias + at, load_partial(bias + output, count, [](const float* b) { return load_f32(b); }));
    }
    I32x16 correction = set_i32(0);
    if (act_zero_point != 0) {
      alignas(4) static constexpr int8_t kOnes[4] = {1, 1, 1, 1};
      const DotQuad<8> ones = load_quad<8>(kOnes);
      I32x16 sum = set_i32(0);
      for (int64_t q = 0; q < quads; ++q) {
        sum = dot<8>(sum, dot_row<8>(load_row(codes + p * panel_bytes + 64 * q)), ones);
      }
      if (binary) sum = add_i32(sum, sum);
      correction = mul_i32(set_i32(act_zero_point), sub_i32(sum, mul_i32(set_i32(inputs), zero)));
    }
    store_i32(to.correction + at, correction);
  }
}

void multiply_rows(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const ConvResults& y, int64_t sample,
                   int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t panel_begin, int64_t panel_end,
                   const float* bias, void* memory) {
  Cutter scratch = {static_cast<std::byte*>(memory)};
  const ConvRows rows = reads_in_place(s) ? in_place_rows(s, x, sample, group, pixel_begin, pixel_end, scratch)
                                          : gathered_rows(s, x, sample, group, pixel_begin, pixel_end, scratch);
  const int bits = w.shape.bits;
  const int64_t quads = ceil_div(s.row_inputs(), 4), outputs = s.group_outputs();
  const int64_t unpacked_bytes = w.shape.padded_in() * kPanel;
  auto* unpacked = scratch.take<uint8_t>(bits == 8 ? 0 : kMaxPanels * unpacked_bytes);
  for (int64_t panel = panel_begin; panel < panel_end; panel += kTilePanels) {
    const int64_t width = std::min<int64_t>(kTilePanels, panel_end - panel);
    const TilePanels panels(panel, panel_end, width);
    PanelCodes packed;
    locate_codes(w, panels, width, 0, packed);
    if (bits < 8) {
      with_bits(bits, [&](auto b) {
        for (int64_t p = 0; p < width; ++p) {
          unpack_units<b>(packed[p], w.shape.padded_in() / k_unit(b), unpacked + p * unpacked_bytes);
        }
      });
    }
    const uint8_t* codes = bits == 8 ? packed[0] : unpacked;
    const int64_t panel_bytes = bits == 8 ? w.shape.panel_bytes() : unpacked_bytes;
    ConvColumns columns;
    load_columns(w, panels, width, codes, panel_bytes, quads, x.zero_point, bias, columns);
    const ConvTile tile = {.rows = rows,
                           .y = y,
                           .codes = codes,
                           .panel_bytes = panel_bytes,
                           .columns = columns,
                           .act_scale = x.scale[sample],
                           .first_output = panel * kPanel,
                           .begin = group * outputs,
                           .end = (group + 1) * outputs,
                           .pixel = sample * s.out_pixels() + pixel_begin,
                           .binary = bits == 1 && w.zero_point == nullptr,
                           .has_bias = bias != nullptr};
    const ConvAllRows multiply = bits == 8 ? conv_rows_of<8>(width) : conv_rows_of<7>(width);
    multiply(tile);
  }
}

void sum_pixels(const int8_t* codes, int64_t count, int64_t inputs, int32_t* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = sum_bytes(codes + i * inputs, inputs);
}

}  // namespace
}  // namespace halfbyte
