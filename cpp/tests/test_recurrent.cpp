// sigmoid and tanh of every level: equal bits, and within 2.5 ulp of the exact functions. One step of each cell: equal
// bits on every level, for every split of the units, and the formulas of recurrent.h in float64.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "halfbyte/dispatch.h"
#include "testing.h"

using namespace halfbyte;
using namespace halfbyte::testing;

namespace {

using Floats = std::vector<float>;

bool equal_bits(const Floats& a, const Floats& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same_bits);
}

double exact_sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Every 97th float32 (44 million), by their bit patterns, in blocks.
template <class F>
void for_every_97th_float(const F& f) {
  Floats block;
  for (uint64_t bits = 0; bits < (1ull << 32); bits += 97) {
    block.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    if (block.size() == 1 << 16 || bits + 97 >= (1ull << 32)) {
      f(block);
      block.clear();
    }
  }
}

double ulp(double exact) {
  const float rounded = static_cast<float>(std::fabs(exact));
  return std::nextafter(rounded, std::numeric_limits<float>::infinity()) - static_cast<double>(rounded);
}

void check_accuracy() {
  const RecurrentKernels& recurrent = kernels().recurrent;
  double worst_sigmoid = 0, worst_tanh = 0, absolute = 0;
  for_every_97th_float([&](const Floats& x) {
    Floats s(x.size()), t(x.size());
    recurrent.sigmoid(x.data(), s.data(), static_cast<int64_t>(x.size()));
    recurrent.tanh(x.data(), t.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
      if (std::isnan(x[i])) {
        CHECK(std::isnan(s[i]) && std::isnan(t[i]), "NaN must stay NaN");
        continue;
      }
      const double sigmoid = exact_sigmoid(x[i]), tanh = std::tanh(static_cast<double>(x[i]));
      if (sigmoid >= 0x1p-125) worst_sigmoid = std::max(worst_sigmoid, std::fabs(s[i] - sigmoid) / ulp(sigmoid));
      worst_tanh = std::max(worst_tanh, std::fabs(t[i] - tanh) / ulp(tanh));
      absolute = std::max({absolute, std::fabs(s[i] - sigmoid), std::fabs(t[i] - tanh)});
    }
  });
  std::printf("%s: sigmoid %.2f ulp, tanh %.2f ulp, %.2e absolute\n", level, worst_sigmoid, worst_tanh, absolute);
  CHECK(worst_sigmoid <= 2.5 && worst_tanh <= 2.5 && absolute <= 1.6e-7, "gates are not accurate enough");
}

Floats random_floats(int64_t count, float spread) {
  static uint64_t state = 88172645463325252ull;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    value = (static_cast<float>(state >> 40) * 0x1p-23f - 1.f) * spread;
  }
  return values;
}

struct State {
  Floats h, c;
};

State exact_step(Cell cell, int64_t hidden, int64_t rows, const Floats& x, const Floats& hg, const Floats& h,
                 const Floats& c) {
  State out = {h, c};
  const int64_t gates = gates_of(cell);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t unit = 0; unit < hidden; ++unit) {
      const auto at = static_cast<size_t>(row * hidden + unit);
      const auto in_x = [&](int64_t gate) {
        return double{x[static_cast<size_t>((row * gates + gate) * hidden + unit)]};
      };
      const auto in_h = [&](int64_t gate) {
        return double{hg[static_cast<size_t>((row * gates + gate) * hidden + unit)]};
      };
      double value = 0;
      if (cell == Cell::kLstm) {
        const double state =
            exact_sigmoid(in_x(1) + in_h(1)) * c[at] + exact_sigmoid(in_x(0) + in_h(0)) * std::tanh(in_x(2) + in_h(2));
        out.c[at] = static_cast<float>(state);
        value = exact_sigmoid(in_x(3) + in_h(3)) * std::tanh(state);
      } else if (cell == Cell::kGru) {
        const double n = std::tanh(in_x(2) + exact_sigmoid(in_x(0) + in_h(0)) * in_h(2));
        value = n + exact_sigmoid(in_x(1) + in_h(1)) * (h[at] - n);
      } else {
        value = cell == Cell::kRnnTanh ? std::tanh(in_x(0) + in_h(0)) : std::max(in_x(0) + in_h(0), 0.0);
      }
      out.h[at] = static_cast<float>(value);
    }
  }
  return out;
}

void check_steps(const char* first_level) {
  for (const Cell cell : {Cell::kLstm, Cell::kGru, Cell::kRnnTanh, Cell::kRnnRelu}) {
    for (const int64_t hidden : {1, 15, 16, 17, 64, 100}) {
      constexpr int64_t kRows = 3;
      const int64_t gates = gates_of(cell);
      const Floats x = random_floats(kRows * gates * hidden, 4.f), hg = random_floats(kRows * gates * hidden, 4.f);
      const Floats h = random_floats(kRows * hidden, 1.f), c = random_floats(kRows * hidden, 2.f);
      const auto run = [&](int64_t split) {
        State out = {Floats(h.size()), c};
        const CellStep step = {x.data(), hg.data(), gates * hidden, gates * hidden,
                               hidden,   h.data(),  out.c.data(),   out.h.data()};
        kernels().recurrent.cell_step(cell, step, kRows, 0, split);
        if (split < hidden) kernels().recurrent.cell_step(cell, step, kRows, split, hidden);
        return out;
      };
      const State whole = run(hidden), split = run(std::min<int64_t>(hidden, 16));
      CHECK(equal_bits(whole.h, split.h) && equal_bits(whole.c, split.c), "a split of the units changes bits");
      const State exact = exact_step(cell, hidden, kRows, x, hg, h, c);
      for (size_t i = 0; i < exact.h.size(); ++i) {
        CHECK(std::fabs(whole.h[i] - exact.h[i]) < 2e-6f, "h is %g, not %g", double{whole.h[i]}, double{exact.h[i]});
        if (cell == Cell::kLstm) {
          CHECK(std::fabs(whole.c[i] - exact.c[i]) < 2e-6f, "c is %g, not %g", double{whole.c[i]}, double{exact.c[i]});
        }
      }
      set_active_level(first_level);
      const State first = run(hidden);
      set_active_level(level);
      CHECK(equal_bits(whole.h, first.h) && equal_bits(whole.c, first.c), "differs from level %s", first_level);
    }
  }
}

}  // namespace

int main() {
  const std::vector<std::string> levels = supported_levels();
  for (const std::string& name : levels) {
    level = name.c_str();
    set_active_level(name);
    check_steps(levels.front().c_str());
    // Accuracy of one level is that of all: the bits are equal over a grid of both functions.
    Floats x = random_floats(1 << 16, 20.f);
    x.insert(x.end(), {0.f, -0.f, 0.625f, -0.625f, 87.f, -87.f, 1e30f, -1e30f, 1e-30f,
                       std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()});
    Floats s(x.size()), t(x.size()), first_s(x.size()), first_t(x.size());
    const auto count = static_cast<int64_t>(x.size());
    kernels().recurrent.sigmoid(x.data(), s.data(), count);
    kernels().recurrent.tanh(x.data(), t.data(), count);
    set_active_level(levels.front());
    kernels().recurrent.sigmoid(x.data(), first_s.data(), count);
    kernels().recurrent.tanh(x.data(), first_t.data(), count);
    CHECK(equal_bits(s, first_s) && equal_bits(t, first_t), "gates differ from level %s", levels.front().c_str());
  }
  level = levels.back().c_str();
  set_active_level(levels.back());
  check_accuracy();
  std::printf("recurrent: all levels agree\n");
  return 0;
}
