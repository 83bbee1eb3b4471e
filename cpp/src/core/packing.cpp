// Packing and unpacking of the two layouts of packing.h. Independent of the CPU: plain loops over bytes and 4-byte
// words.
//
// The tiles layout moves four inputs of one output (a quad) at a time, as one 32-bit word. A plane of p bits takes
// (word >> shift) & mask, mask = p ones in each byte: what the shift drags over from the next byte lands above the
// mask, as shift + p <= 8. Shifting such a word left by p*t <= 8 - p stays inside its bytes too. So no step depends on
// the order of bytes in a word.
#include "halfbyte/packing.h"

#include <algorithm>
#include <cstring>

namespace halfbyte {
namespace {

constexpr int64_t kQuad = 4;      // inputs in one word
constexpr int64_t kMaxUnit = 32;  // the largest k_unit()

constexpr uint32_t plane_mask(int plane) { return ((1u << plane) - 1u) * 0x01010101u; }

// Calls f with the plane width as a compile-time constant, so that the loops inside unroll.
template <class F>
void for_each_static_plane(int bits, F&& f) {
  for_each_plane(bits, [&](int plane, int shift) {
    switch (plane) {
      case 8:
        return f.template operator()<8>(shift);
      case 4:
        return f.template operator()<4>(shift);
      case 2:
        return f.template operator()<2>(shift);
      default:
        return f.template operator()<1>(shift);
    }
  });
}

template <int Plane>
uint8_t* pack_plane(const uint8_t* codes, int64_t length, int shift, uint8_t* packed) {
  constexpr int kPerByte = 8 / Plane;
  constexpr unsigned kMask = (1u << Plane) - 1u;
  const int64_t whole = length / kPerByte;
  for (int64_t i = 0; i < whole; ++i) {
    unsigned byte = 0;
    for (int t = 0; t < kPerByte; ++t) byte |= ((codes[i * kPerByte + t] >> shift) & kMask) << (Plane * t);
    packed[i] = static_cast<uint8_t>(byte);
  }
  if (whole * kPerByte == length) return packed + whole;
  unsigned byte = 0;
  for (int64_t i = whole * kPerByte; i < length; ++i) {
    byte |= ((codes[i] >> shift) & kMask) << (Plane * (i % kPerByte));
  }
  packed[whole] = static_cast<uint8_t>(byte);
  return packed + whole + 1;
}

template <int Plane>
const uint8_t* unpack_plane(const uint8_t* packed, int64_t length, int shift, uint8_t* codes) {
  constexpr int kPerByte = 8 / Plane;
  constexpr unsigned kMask = (1u << Plane) - 1u;
  const unsigned keep = shift == 0 ? 0u : 0xffu;  // the first plane overwrites, the others add their bits
  const int64_t whole = length / kPerByte;
  for (int64_t i = 0; i < whole; ++i) {
    for (int t = 0; t < kPerByte; ++t) {
      uint8_t& code = codes[i * kPerByte + t];
      code = static_cast<uint8_t>((code & keep) | (((packed[i] >> (Plane * t)) & kMask) << shift));
    }
  }
  for (int64_t i = whole * kPerByte; i < length; ++i) {
    const unsigned bits = (packed[whole] >> (Plane * (i % kPerByte))) & kMask;
    codes[i] = static_cast<uint8_t>((codes[i] & keep) | (bits << shift));
  }
  return packed + ceil_div(length, kPerByte);
}

// The codes of one unit: rows of a panel by inputs, zero where the weight has none.
struct Unit {
  uint32_t quads[kPanel][kMaxUnit / kQuad];
};

template <int Plane>
uint8_t* pack_unit_plane(const Unit& unit, int64_t k_unit, int shift, uint8_t* packed) {
  constexpr int kPerByte = 8 / Plane;
  constexpr uint32_t kMask = plane_mask(Plane);
  for (int64_t quad = 0; quad < k_unit / kQuad; quad += kPerByte) {
    uint32_t row[kPanel] = {};
    for (int t = 0; t < kPerByte; ++t) {
      for (int64_t c = 0; c < kPanel; ++c) row[c] |= ((unit.quads[c][quad + t] >> shift) & kMask) << (Plane * t);
    }
    std::memcpy(packed, row, sizeof(row));
    packed += sizeof(row);
  }
  return packed;
}

template <int Plane>
const uint8_t* unpack_unit_plane(const uint8_t* packed, int64_t k_unit, int shift, Unit& unit) {
  constexpr int kPerByte = 8 / Plane;
  constexpr uint32_t kMask = plane_mask(Plane);
  for (int64_t quad = 0; quad < k_unit / kQuad; quad += kPerByte) {
    uint32_t row[kPanel];
    std::memcpy(row, packed, sizeof(row));
    packed += sizeof(row);
    for (int t = 0; t < kPerByte; ++t) {
      for (int64_t c = 0; c < kPanel; ++c) unit.quads[c][quad + t] |= ((row[c] >> (Plane * t)) & kMask) << shift;
    }
  }
  return packed;
}

// Calls f(input, count) for each unit of a panel in storage order: it holds the `count` inputs that begin at `input`.
template <class F>
void for_each_unit(const TileShape& shape, F&& f) {
  const int64_t unit = k_unit(shape.bits);
  for (int64_t group = 0; group < shape.groups(); ++group) {
    const int64_t begin = group * shape.group_size;
    const int64_t end = std::min(begin + shape.group_size, shape.in_features);
    for (int64_t k = begin; k < begin + shape.padded_group(); k += unit) {
      f(k, std::clamp<int64_t>(end - k, 0, unit));
    }
  }
}

}  // namespace

void pack_rows(const uint8_t* codes, int64_t rows, int64_t length, int bits, uint8_t* packed) {
  for (int64_t row = 0; row < rows; ++row, codes += length) {
    for_each_static_plane(bits,
                          [&]<int Plane>(int shift) { packed = pack_plane<Plane>(codes, length, shift, packed); });
  }
}

void unpack_rows(const uint8_t* packed, int64_t rows, int64_t length, int bits, uint8_t* codes) {
  for (int64_t row = 0; row < rows; ++row, codes += length) {
    for_each_static_plane(bits,
                          [&]<int Plane>(int shift) { packed = unpack_plane<Plane>(packed, length, shift, codes); });
  }
}

void pack_tiles(const uint8_t* codes, const TileShape& shape, int64_t panel_begin, int64_t panel_end, uint8_t* packed) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    uint8_t* out = packed + panel * shape.panel_bytes();
    const uint8_t* rows = codes + panel * kPanel * shape.in_features;
    const int64_t present = std::min(kPanel, shape.out_features - panel * kPanel);
    for_each_unit(shape, [&](int64_t k, int64_t count) {
      Unit unit = {};
      if (count > 0) {
        for (int64_t c = 0; c < present; ++c) {
          std::memcpy(unit.quads[c], rows + c * shape.in_features + k, static_cast<size_t>(count));
        }
      }
      for_each_static_plane(shape.bits, [&]<int Plane>(int shift) {
        out = pack_unit_plane<Plane>(unit, k_unit(shape.bits), shift, out);
      });
    });
  }
}

void unpack_tiles(const uint8_t* packed, const TileShape& shape, int64_t panel_begin, int64_t panel_end,
                  uint8_t* codes) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* in = packed + panel * shape.panel_bytes();
    uint8_t* rows = codes + panel * kPanel * shape.in_features;
    const int64_t present = std::min(kPanel, shape.out_features - panel * kPanel);
    for_each_unit(shape, [&](int64_t k, int64_t count) {
      Unit unit = {};
      for_each_static_plane(shape.bits, [&]<int Plane>(int shift) {
        in = unpack_unit_plane<Plane>(in, k_unit(shape.bits), shift, unit);
      });
      if (count == 0) return;
      for (int64_t c = 0; c < present; ++c) {
        std::memcpy(rows + c * shape.in_features + k, unit.quads[c], static_cast<size_t>(count));
      }
    });
  }
}

void unpack_tile_row(const uint8_t* packed, const TileShape& shape, int64_t row, uint8_t* codes) {
  const uint8_t* in = packed + row / kPanel * shape.panel_bytes() + row % kPanel * kQuad;
  for_each_unit(shape, [&](int64_t k, int64_t count) {
    uint32_t quads[kMaxUnit / kQuad] = {};
    for_each_static_plane(shape.bits, [&]<int Plane>(int shift) {
      constexpr int kPerByte = 8 / Plane;
      for (int64_t quad = 0; quad < k_unit(shape.bits) / kQuad; quad += kPerByte, in += kPanel * kQuad) {
        uint32_t word;
        std::memcpy(&word, in, sizeof(word));
        for (int t = 0; t < kPerByte; ++t) quads[quad + t] |= ((word >> (Plane * t)) & plane_mask(Plane)) << shift;
      }
    });
    if (count > 0) std::memcpy(codes + k, quads, static_cast<size_t>(count));
  });
}

}  // namespace halfbyte
