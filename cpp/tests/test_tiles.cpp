// The amx level uses tiles where it should, and leaves the tile configuration of the calling thread as it found it.
// Built with emulation/amx.h: the configuration and the count of products are those of its arrays.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulation/amx.h"
#include "halfbyte/dispatch.h"

using namespace halfbyte;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Tile products that one matrix product takes.
int64_t products(int64_t rows, const TileShape& shape) {
  const auto size = [](int64_t n) { return static_cast<size_t>(n); };
  std::vector<uint8_t> codes(size(shape.panels() * shape.panel_bytes()), 1);
  std::vector<float> scale(size(shape.groups() * shape.out_features), 1.0f), row_scale(size(rows), 1.0f);
  std::vector<float> y(size(rows * shape.out_features));
  std::vector<int8_t> x(size(rows * code_stride(shape)), 1);
  std::vector<int32_t> sums(size(rows * shape.groups()));
  std::vector<std::byte> scratch(size(amx::kernel_table.matmul.scratch_bytes(shape)) + 64);
  void* memory = scratch.data();
  size_t room = scratch.size();
  const TiledWeight w = {shape, codes.data(), scale.data(), FloatType::kFloat32, nullptr};
  const int64_t before = tile_emulation::tiles.products;
  amx::kernel_table.matmul.matmul_int8(w, {x.data(), row_scale.data(), sums.data(), 0}, 0, rows, 0, shape.panels(),
                                       nullptr, y.data(), shape.out_features, std::align(64, room - 64, memory, room));
  return tile_emulation::tiles.products - before;
}

}  // namespace

int main() {
  const TileShape shape = {.out_features = 64, .in_features = 128, .group_size = 128, .bits = 8};
  check(products(15, shape) == 0, "15 rows need no tiles");
  check(products(16, shape) == 8, "16 rows x 4 panels x 128 inputs are 8 products");
  check(products(40, shape) == 24, "40 rows are three tiles of rows");
  check(tile_emulation::tiles.setup.palette == 0, "tiles that were not configured before must be released");
  const TileShape small = {.out_features = 64, .in_features = 128, .group_size = 16, .bits = 4};
  check(products(40, small) == 0, "groups of 16 are left to dot products");

  tile_emulation::TileSetup theirs = {};
  theirs.palette = 1;
  theirs.rows[0] = theirs.rows[3] = 5;
  theirs.row_bytes[0] = theirs.row_bytes[3] = 12;
  tile_emulation::load_config(&theirs);
  check(products(16, shape) == 8, "16 rows x 4 panels x 128 inputs are 8 products");
  check(std::memcmp(&theirs, &tile_emulation::tiles.setup, sizeof(theirs)) == 0,
        "the caller's configuration must come back");
  std::printf("tiles: used for many rows, configuration kept\n");
}
