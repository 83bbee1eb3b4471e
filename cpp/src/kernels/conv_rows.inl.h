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

// Whether activations are made unsigned, so that no sums of them are needed.
inline bool unsigned_activations(const TiledWeight& w) {
#ifdef HALFBYTE_UNSIGNED_ACTIVATIONS
  return w.zero_point == nullptr;
#else
  (void)w;
  return false;
#endif
}

// The rows of one run of output pixels in one group of channels.
struct ConvRows {
  const int8_t** segments;      // [count, rows]: where the inputs of each row begin
  int32_t* sum;                 // [rows]: sum(a); null with unsigned activations
  int64_t rows, count, inputs;  // inputs of a segment, whole quads
};

// Qparams of the panels of a tile, ready for the epilogue.
struct ConvColumns {
  alignas(64) float scale[kMaxPanels * kPanel];
  alignas(64) float bias[kMaxPanels * kPanel];
  alignas(64) int32_t zero[kMaxPanels * kPanel];
  alignas(64) int32_t start[kMaxPanels * kPanel];  // of the sums: what the zero point of activations adds, taken off
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
  bool one_zero;  // all columns have the zero point columns.zero[0]
};

// Results of the rows from `row` on, from their sums [rows, Panels, 16].
template <int Panels, bool UnsignedActivations>
[[gnu::noinline]] void finish_rows(const ConvTile& t, int64_t row, int64_t rows, const int32_t* sums) {
  const ConvResults y = t.y;  // a copy, so that the compiler knows that stores of codes do not change it
  const int32_t* row_sum = t.rows.sum;
  const bool binary = t.binary, has_bias = t.has_bias, one_zero = t.one_zero;
  const F32x16 act_scale = set_f32(t.act_scale), nothing = set_f32(0.0f);
  // Most panels are stored whole and in one form.
  const bool bare = y.residual == nullptr && y.added == nullptr && (y.floats == nullptr || y.codes == nullptr);
  const int64_t whole = bare && t.begin <= t.first_output ? (t.end - t.first_output) / kPanel : 0;
  for (const int64_t end = row + rows; row < end; ++row) {
    I32x16 taken = set_i32(0);
    if constexpr (!UnsignedActivations) taken = set_i32(one_zero ? t.columns.zero[0] * row_sum[row] : row_sum[row]);
    const int64_t pixel = t.pixel + row;
    unroll<Panels>([&](auto p) {
      const int at = p * kPanel;
      I32x16 sum = load_i32(sums + at);
      if constexpr (!UnsignedActivations) {
        if (binary) sum = add_i32(sum, add_i32(sum, load_i32(t.columns.start + at)));
        sum = sub_i32(sum, one_zero ? taken : mul_i32(load_i32(t.columns.zero + at), taken));
      }
      const F32x16 folded = fma_f32(load_f32(t.columns.scale + at), to_float(sum), nothing);
      const F32x16 value =
          has_bias ? fma_f32(act_scale, folded, load_f32(t.columns.bias + at)) : mul_f32(act_scale, folded);
      const int64_t output = t.first_output + at;
      if (p >= whole) {
        store_finished(y, pixel, output, std::max<int64_t>(t.begin - output, 0), std::min(t.end - output, kPanel),
                       value);
      } else if (y.codes == nullptr) {
        store_f32(y.floats + pixel * y.channels + output, activated(value, y));
      } else {
        store_low_bytes(y.codes + pixel * y.code_stride + output, requantized(activated(value, y), y.requantization));
      }
    });
    sums += Panels * kPanel;
  }
}

// What follows the products is a function of its own: in this
// one, the accumulators would lose their registers to it.
template <class Dot, int Rows, int Panels>
void conv_tile(const ConvTile& t, int64_t row) {
  I32x16 acc[Rows][Panels];
  unroll<Panels>([&](auto p) {
    const I32x16 start = t.binary && !Dot::kUnsignedActivations ? set_i32(0) : load_i32(t.columns.start + p * kPanel);
    unroll<Rows>([&](auto r) { acc[r][p] = start; });
  });
  const uint8_t* w = t.codes;
  const int64_t inputs = t.rows.inputs, panel_bytes = t.panel_bytes, stride = t.rows.rows;
  const int8_t* const* from = t.rows.segments + row;
  for (int64_t segment = 0; segment < t.rows.count; ++segment, from += stride) {
    const int8_t* a[Rows];
    unroll<Rows>([&](auto r) { a[r] = from[r]; });
    for (int64_t k = 0; k < inputs; k += 4, w += 64) {
      typename Dot::Row codes[Panels];
      unroll<Panels>([&](auto p) { codes[p] = Dot::row(w + p * panel_bytes); });
      unroll<Rows>([&](auto r) {
        const typename Dot::Quad quad = Dot::quad(a[r] + k);
        unroll<Panels>([&](auto p) { acc[r][p] = Dot::dot(acc[r][p], codes[p], quad); });
      });
    }
  }
  alignas(64) int32_t sums[Rows * Panels * kPanel];
  unroll<Rows>(
      [&](auto r) { unroll<Panels>([&](auto p) { store_i32(sums + (r * Panels + p) * kPanel, acc[r][p]); }); });
  finish_rows<Panels, Dot::kUnsignedActivations>(t, row, Rows, sums);
}

// All rows of a tile of panels. The last tile of rows overlaps the one before it: its results are the same again.
template <class Dot, int Panels>
void conv_all_rows(const ConvTile& t) {
  constexpr int kRows = conv_tile_rows(Panels);
  int64_t row = 0;
  if (t.rows.rows >= kRows) {
    for (; row + kRows <= t.rows.rows; row += kRows) conv_tile<Dot, kRows, Panels>(t, row);
    if (row < t.rows.rows) conv_tile<Dot, kRows, Panels>(t, t.rows.rows - kRows);
    return;
  }
  for (; row + 2 <= t.rows.rows; row += 2) conv_tile<Dot, 2, Panels>(t, row);
  if (row < t.rows.rows) conv_tile<Dot, 1, Panels>(t, row);
}

using ConvAllRows = void (*)(const ConvTile&);
template <class Dot>
ConvAllRows conv_rows_of(int64_t panels) {
  if constexpr (kTilePanels > 1) {
    if (panels == 2) return conv_all_rows<Dot, 2>;
    if (panels == 3) return conv_all_rows<Dot, 3>;
    if (panels == 4) return conv_all_rows<Dot, 4>;
  }
  return conv_all_rows<Dot, 1>;
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

// Pointers to the inputs of one tap for the pixels [begin, end), and what they add to the sums, if there are any.
inline void tap_segments(const ConvShape& s, const ConvInput& x, int64_t sample, int64_t group, int64_t tap,
                         int64_t begin, int64_t end, const int8_t* outside, const int8_t** segments, int32_t* sum) {
  const int64_t kx = tap % s.kernel[2], ky = tap / s.kernel[2] % s.kernel[1], kz = tap / s.kernel[2] / s.kernel[1];
  const int64_t channels = s.in_channels, inputs = s.group_inputs();
  const int8_t* codes = x.codes + sample * s.in_pixels() * channels + group * inputs;
  const int32_t* pixel_sum = sum == nullptr ? nullptr : x.pixel_sum + sample * s.in_pixels() * s.groups + group;
  const auto outside_sum = static_cast<int32_t>(x.zero_point * inputs);
  const Span columns = inside(s, 2, kx), lines = inside(s, 1, ky), planes = inside(s, 0, kz);
  const auto pad = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) *segments++ = outside;
    for (int64_t i = 0; sum != nullptr && i < count; ++i) *sum++ += outside_sum;
  };
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t ox = pixel % s.out[2], line = pixel / s.out[2], oy = line % s.out[1], oz = line / s.out[1];
    const int64_t ox_end = std::min(s.out[2], ox + end - pixel);
    const bool out = oy < lines.begin || oy >= lines.end || oz < planes.begin || oz >= planes.end;
    const int64_t from = out ? ox_end : std::clamp(columns.begin, ox, ox_end);
    const int64_t to = out ? ox_end : std::clamp(columns.end, from, ox_end);
    pad(from - ox);
    const int64_t iz = oz * s.stride[0] + kz * s.dilation[0] - s.padding[0];
    const int64_t iy = oy * s.stride[1] + ky * s.dilation[1] - s.padding[1];
    const int64_t ix = from * s.stride[2] + kx * s.dilation[2] - s.padding[2];
    const int64_t first = from < to ? (iz * s.in[1] + iy) * s.in[2] + ix : 0, step = s.stride[2];
    const int64_t count = to - from;
    for (int64_t i = 0; i < count; ++i) segments[i] = codes + (first + i * step) * channels;
    segments += count;
    if (sum != nullptr) {
      for (int64_t i = 0; i < count; ++i) sum[i] += pixel_sum[(first + i * step) * s.groups];
      sum += count;
    }
    pad(ox_end - to);
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

inline ConvRows in_place_rows(const ConvShape& s, const ConvInput& x, bool sums, int64_t sample, int64_t group,
                              int64_t begin, int64_t end, Cutter& scratch) {
  const int64_t rows = end - begin, taps = s.taps();
  auto* sum = scratch.take<int32_t>(rows);
  const ConvRows r = {scratch.take<const int8_t*>(taps * rows), sums ? sum : nullptr, rows, taps, s.group_inputs()};
  auto* outside = scratch.take<int8_t>(s.group_inputs());
  std::memset(outside, x.zero_point, static_cast<size_t>(s.group_inputs()));
  std::fill_n(sum, rows, 0);
  for (int64_t tap = 0; tap < taps; ++tap) {
    tap_segments(s, x, sample, group, tap, begin, end, outside, r.segments + tap * rows, r.sum);
  }
  return r;
}

// Copies of the `count` bytes of a tap or a line of taps: one move of 16 bytes where both sides have room for it.
HALFBYTE_INLINE void copy_taps(int8_t* to, const int8_t* from, int64_t count, const int8_t* end) {
  if (count <= 16 && end - from >= 16) {
    std::memcpy(to, from, 16);
  } else {
    std::memcpy(to, from, static_cast<size_t>(count));
  }
}

inline ConvRows gathered_rows(const ConvShape& s, const ConvInput& x, bool sums, int64_t sample, int64_t group,
                              int64_t begin, int64_t end, Cutter& scratch) {
  const int64_t rows = end - begin, inputs = s.group_inputs(), taps = s.taps(), stride = round_up(s.row_inputs(), 64);
  auto* sum = scratch.take<int32_t>(rows);
  const ConvRows r = {scratch.take<const int8_t*>(rows), sums ? sum : nullptr, rows, 1, round_up(s.row_inputs(), 4)};
  auto* codes = scratch.take<int8_t>(rows * stride + 16);
  auto* pixels = scratch.take<int32_t>(taps * rows);
  for (int64_t tap = 0; tap < taps; ++tap) tap_pixels(s, tap, begin, end, pixels + tap * rows);
  const int8_t* from = x.codes + sample * s.in_pixels() * s.in_channels + group * inputs;
  const int8_t* codes_end = x.codes + s.batch * s.in_pixels() * s.in_channels;
  // Where the columns of the kernel are neighbours in memory too, they are copied together.
  const bool joined = !s.transposed && s.dilation[2] == 1 && s.groups == 1;
  const int64_t padding = r.inputs - s.row_inputs();
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
        copy_taps(to, from + first * s.in_channels, count * inputs, codes_end);
      }
      to += count * inputs, tap += count;
    }
    if (sums) r.sum[row] = sum_bytes(codes + row * stride, s.row_inputs());
    std::memset(to, sums ? 0 : -128, static_cast<size_t>(padding));  // adds nothing
  }
  return r;
}

// Unpacked codes of `bits` bits as codes of center 128, which stands for zero.
inline void center_codes(uint8_t* codes, int64_t rows, int bits) {
  const int factor = bits == 1 ? 2 : 1, shift = bits == 1 ? 127 : 128 - (1 << (bits - 1));
  for (int64_t row = 0; row < rows; ++row, codes += 64) {
    for (int i = 0; i < 64; ++i) codes[i] = static_cast<uint8_t>(codes[i] * factor + shift);
  }
}

// Qparams of the panels of a tile; `codes` are its 8-bit quads.
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
    I32x16 start = set_i32(0);
    const bool unsigned_sums = unsigned_activations(w);
    const int32_t taken = unsigned_sums ? 128 + act_zero_point : act_zero_point;
    if (taken != 0) {
      alignas(4) static constexpr int8_t kOnes[4] = {1, 1, 1, 1};
      const DotQuad<8> ones = load_quad<8>(kOnes);
      I32x16 sum = set_i32(0);
      for (int64_t q = 0; q < quads; ++q) {
        sum = dot<8>(sum, dot_row<8>(load_row(codes + p * panel_bytes + 64 * q)), ones);
      }
      if (unsigned_sums) {  // of codes with center 128; beyond the inputs, packed codes are 0
        const int32_t beyond = static_cast<int32_t>(4 * quads) - inputs;
        sum = sub_i32(sum, set_i32(128 * inputs + (128 - center) * beyond));
      } else {
        if (binary) sum = add_i32(sum, sum);
        sum = sub_i32(sum, mul_i32(set_i32(inputs), zero));
      }
      start = mul_i32(set_i32(-taken), sum);
    }
    store_i32(to.start + at, start);
  }
}

void multiply_rows(const ConvShape& s, const TiledWeight& w, const ConvInput& x, const ConvResults& y, int64_t sample,
                   int64_t group, int64_t pixel_begin, int64_t pixel_end, int64_t panel_begin, int64_t panel_end,
                   const float* bias, void* memory) {
  Cutter scratch = {static_cast<std::byte*>(memory)};
  const bool unsigned_sums = unsigned_activations(w);
  const ConvRows rows = reads_in_place(s)
                            ? in_place_rows(s, x, !unsigned_sums, sample, group, pixel_begin, pixel_end, scratch)
                            : gathered_rows(s, x, !unsigned_sums, sample, group, pixel_begin, pixel_end, scratch);
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
      if (unsigned_sums) center_codes(unpacked, width * unpacked_bytes / 64, bits);
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
                           .has_bias = bias != nullptr,
                           .one_zero = w.zero_point == nullptr};
#ifdef HALFBYTE_UNSIGNED_ACTIVATIONS
    if (unsigned_sums) {
      conv_rows_of<ActivationsTimesWeights>(width)(tile);
      continue;
    }
#endif
    (bits == 8 ? conv_rows_of<CodesTimesActivations<8>> : conv_rows_of<CodesTimesActivations<7>>)(width)(tile);
  }
}

// Whether multiply_rows reads x.pixel_sum.
bool needs_pixel_sums(const ConvShape& s, const TiledWeight& w) {
  return reads_in_place(s) && !unsigned_activations(w);
}

// Whole rows of 64 codes are read, of which the ones of the last row pick what belongs to the pixel; the last pixels,
// behind which 64 bytes may not be there, are summed on their own.
void sum_pixels(const int8_t* codes, int64_t count, int64_t inputs, int32_t* sums) {
  static constexpr Ones kOnes;
  static constexpr uint8_t kNothing[64] = {};
  const int64_t rows = ceil_div(inputs, 64), last = inputs - 64 * (rows - 1);
  const int64_t whole = rows > 4 || rows == 0 ? 0 : std::max<int64_t>(count - ceil_div(64 * rows, inputs), 0);
  uint8_t some[64];
  std::memcpy(some, kNothing, 64);
  std::memcpy(some, kOnes.bytes, static_cast<size_t>(rows == 0 ? 0 : last));
  const QuadWeights ones = load_quad_weights(kOnes.bytes), ones_of_last = load_quad_weights(some);
  const U8x64 flip = set_bytes(0x80);
  for (int64_t i = 0; i < whole; ++i) {
    const auto* from = reinterpret_cast<const uint8_t*>(codes + i * inputs);
    I32x16 total = set_i32(0);  // of unsigned codes + 128
    for (int64_t row = 0; row + 1 < rows; ++row, from += 64) {
      total = dot_quads(total, xor_rows(load_row(from), flip), ones);
    }
    total = dot_quads(total, xor_rows(load_row(from), flip), ones_of_last);
    int32_t lanes[16], sum = 0;
    store_i32(lanes, total);
    for (int32_t lane : lanes) sum += lane;
    sums[i] = sum - static_cast<int32_t>(128 * inputs);
  }
  for (int64_t i = whole; i < count; ++i) sums[i] = sum_bytes(codes + i * inputs, inputs);
}

}  // namespace
}  // namespace halfbyte
