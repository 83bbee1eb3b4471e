// recurrent: all steps of one layer in one direction, given the input half of its gates. recurrent_cell: one step,
// given both halves.
//
// A step quantizes (or pads) the hidden state, multiplies it by the weights of all gates and applies the gates. Units
// of the hidden state are split over threads, each with the same units of every gate, so that a thread's share of the
// product and its gates are one parallel section; only the state's codes are shared between steps.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "halfbyte/dispatch.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kChunkBytes = 1 << 17;  // weights that a thread reads in a step at least, counted once every 4 rows
constexpr int64_t kCellGrain = 1 << 14;   // units that a thread takes at least where only gates are computed

Cell cell_of(int64_t cell) {
  check(cell >= 0 && cell <= 3, "cell=", cell, " is outside 0..3");
  return static_cast<Cell>(cell);
}

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<char[], AlignedDelete>;

Buffer aligned_bytes(int64_t bytes) {
  return Buffer(
      static_cast<char*>(::operator new[](static_cast<size_t>(std::max<int64_t>(bytes, 1)), std::align_val_t{64})));
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// A float32 copy that may be written to.
Tensor copy_of(const Tensor& tensor) {
  Tensor copy = new_tensor(tensor, tensor.sizes(), ScalarType::Float);
  const Tensor source = as_contiguous(tensor);
  std::memcpy(copy.mutable_data_ptr(), source.const_data_ptr(), static_cast<size_t>(source.numel()) * sizeof(float));
  return copy;
}

void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) equal = equal && tensor.size(dim++) == size;
  if (equal) return;
  std::ostringstream text;
  for (int64_t size : shape) text << (text.tellp() > 0 ? ", " : "") << size;
  check(false, name, " does not have the shape (", text.str(), ")");
}

// The hidden weights, checked against the size of the state.
class HiddenWeight {
 public:
  HiddenWeight(const Tensor& qweight, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& bias,
               const OptionalTensor& codebook, int64_t out_features, int64_t in_features, int64_t bits,
               int64_t group_size)
      : qweight_(as_contiguous(qweight)), scale_(as_contiguous(scale)) {
    check(bits >= 1 && bits <= 8, "bits=", bits, " is outside 1..8");
    check(group_size >= 1 && in_features % group_size == 0, "group_size=", group_size, " does not divide ",
          in_features);
    const TileShape shape = {out_features, in_features, group_size, static_cast<int>(bits)};
    check_type(qweight, ScalarType::Byte, "qweight");
    check_shape(qweight, {shape.panels(), shape.panel_bytes()}, "qweight");
    check_shape(scale, {shape.groups(), out_features}, "scale");
    const uint8_t* zeros = nullptr;
    if (zero_point) {
      check_type(*zero_point, ScalarType::Byte, "zero_point");
      check_shape(*zero_point, {shape.groups(), out_features}, "zero_point");
      zero_point_ = as_contiguous(*zero_point);
      zeros = static_cast<const uint8_t*>(zero_point_->const_data_ptr());
    }
    if (bias) {
      const FloatType type = float_type(*bias, "bias");
      check_shape(*bias, {out_features}, "bias");
      const Tensor source = as_contiguous(*bias);
      bias_.resize(static_cast<size_t>(out_features));
      kernels().elementwise.to_float(source.const_data_ptr(), type, bias_.data(), out_features);
    }
    weight_ = {shape, static_cast<const uint8_t*>(qweight_.const_data_ptr()), scale_.const_data_ptr(),
               float_type(scale, "scale"), zeros};
    if (codebook) weight_.codebook = check_codebook_table(*codebook, bits, zero_point);
  }

  const TiledWeight& get() const { return weight_; }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

 private:
  Tensor qweight_, scale_;
  OptionalTensor zero_point_;
  std::vector<float> bias_;
  TiledWeight weight_;
};

// The state as the product reads it, and the product.
class HiddenProduct {
 public:
  HiddenProduct(const HiddenWeight& weight, int64_t rows, bool int8)
      : weight_(weight), shape_(weight.get().shape), int8_(int8), ld_(shape_.panels() * kPanel) {
    const int64_t chunks = shape_.groups() * chunks_per_group(shape_);
    codes_ = aligned_bytes(rows * (int8 ? code_stride(shape_) : float_stride(shape_) * 4));
    sums_ = aligned_bytes(rows * std::max(chunks, shape_.groups()) * 4);
    scales_.resize(static_cast<size_t>(rows));
    gates_ = aligned_bytes(rows * ld_ * 4);
    rows_ = {reinterpret_cast<int8_t*>(codes_.get()), scales_.data(), reinterpret_cast<int32_t*>(sums_.get()), 0};
  }

  void read_state(const float* h, int64_t rows) {
    const MatmulKernels& matmul = kernels().matmul;
    if (int8_) {
      matmul.quantize_rows_dynamic(h, shape_.in_features, 0, rows, shape_, rows_);
    } else {
      matmul.pad_rows(h, shape_.in_features, 0, rows, shape_, reinterpret_cast<float*>(codes_.get()),
                      reinterpret_cast<float*>(sums_.get()));
    }
  }

  void multiply(int64_t rows, int64_t panel_begin, int64_t panel_end, void* scratch) {
    const MatmulKernels& matmul = kernels().matmul;
    if (int8_) {
      matmul.matmul_int8(weight_.get(), rows_, 0, rows, panel_begin, panel_end, weight_.bias(), gates(), ld_, scratch);
    } else {
      matmul.matmul_float(weight_.get(), reinterpret_cast<const float*>(codes_.get()),
                          reinterpret_cast<const float*>(sums_.get()), 0, rows, panel_begin, panel_end, weight_.bias(),
                          gates(), ld_, scratch);
    }
  }

  float* gates() { return reinterpret_cast<float*>(gates_.get()); }
  int64_t stride() const { return ld_; }

 private:
  const HiddenWeight& weight_;
  TileShape shape_;
  bool int8_;
  int64_t ld_;
  Buffer codes_, sums_, gates_;
  std::vector<float> scales_;
  QuantizedRows rows_;
};

// Rows of each step: all of them, or those that a packed sequence's batch_sizes say.
struct Steps {
  std::vector<int64_t> rows, offset;

  Steps(const Tensor& x_gates, const OptionalTensor& batch_sizes, int64_t batch) {
    if (!batch_sizes) {
      check(x_gates.dim() == 3 && x_gates.size(1) == batch, "x_gates must have the shape (steps, ", batch,
            ", gates * hidden)");
      for (int64_t t = 0; t < x_gates.size(0); ++t) add(batch);
      return;
    }
    check(x_gates.dim() == 2, "x_gates of a packed sequence must have two dimensions");
    check_type(*batch_sizes, ScalarType::Long, "batch_sizes");
    check(batch_sizes->dim() == 1, "batch_sizes must have one dimension");
    const Tensor sizes = as_contiguous(*batch_sizes);
    const auto* values = static_cast<const int64_t*>(sizes.const_data_ptr());
    int64_t before = batch;
    for (int64_t t = 0; t < sizes.numel(); ++t) {
      check(values[t] >= 1 && values[t] <= before, "batch_sizes[", t, "]=", values[t], " is not in 1..", before,
            "; sizes of a packed sequence do not grow and are not zero");
      add(before = values[t]);
    }
    check(total == x_gates.size(0), "batch_sizes add up to ", total, " but x_gates has ", x_gates.size(0), " rows");
  }

 private:
  void add(int64_t count) {
    rows.push_back(count);
    offset.push_back(total);
    total += count;
  }
  int64_t total = 0;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> recurrent(Tensor x_gates, Tensor h0, OptionalTensor c0, Tensor qweight, Tensor scale,
                                             OptionalTensor zero_point, OptionalTensor bias, int64_t cell_index,
                                             int64_t bits, int64_t group_size, bool int8, bool reverse,
                                             OptionalTensor batch_sizes, OptionalTensor codebook) {
  const Cell cell = cell_of(cell_index);
  check_type(x_gates, ScalarType::Float, "x_gates");
  check_type(h0, ScalarType::Float, "h0");
  check(h0.dim() == 2, "h0 must have the shape (batch, hidden)");
  const int64_t batch = h0.size(0), hidden = h0.size(1), gates = gates_of(cell);
  check(c0.has_value() == (cell == Cell::kLstm), "an LSTM needs c0, other cells have none");
  if (c0) {
    check_type(*c0, ScalarType::Float, "c0");
    check_shape(*c0, {batch, hidden}, "c0");
  }
  check(x_gates.dim() >= 2 && x_gates.size(x_gates.dim() - 1) == gates * hidden, "x_gates must have ", gates * hidden,
        " columns");
  check(hidden > 0, "hidden is 0");
  const Steps steps(x_gates, batch_sizes, batch);
  check(!codebook || !int8, "a codebook needs float activations");
  const HiddenWeight weight(qweight, scale, zero_point, bias, codebook, gates * hidden, hidden, bits, group_size);

  const Tensor x = as_contiguous(x_gates);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = hidden;
  Tensor output = new_tensor(x, sizes, ScalarType::Float);
  Tensor h = copy_of(h0);
  Tensor c = c0 ? copy_of(*c0) : new_tensor(h0, {0}, ScalarType::Float);
  auto* state = static_cast<float*>(h.mutable_data_ptr());
  auto* y = static_cast<float*>(output.mutable_data_ptr());

  const TileShape& shape = weight.get().shape;
  const MatmulKernels& matmul = kernels().matmul;
  const auto step_cell = kernels().recurrent.cell_step;
  HiddenProduct product(weight, batch, int8);
  // A unit's gates lie in panels of their own only where `hidden` fills whole panels; else one thread does it all.
  const int64_t unit_tile = matmul.panels_per_tile * kPanel;
  const int64_t tiles = hidden % kPanel == 0 ? ceil_div(hidden, unit_tile) : 1;
  const int64_t work = shape.panels() * shape.panel_bytes() * ceil_div(batch, 4);
  const int64_t chunks =
      std::clamp<int64_t>(work / kChunkBytes, 1, std::min<int64_t>(tiles, torch::stable::get_num_threads()));
  const int64_t scratch_bytes = round_up(matmul.scratch_bytes(shape), 64);
  const Buffer scratch = aligned_bytes(scratch_bytes * chunks);

  const auto count = static_cast<int64_t>(steps.rows.size());
  for (int64_t i = 0; i < count; ++i) {
    const auto t = static_cast<size_t>(reverse ? count - 1 - i : i);
    const int64_t rows = steps.rows[t];
    const CellStep step = {.x_gates = floats(x) + steps.offset[t] * gates * hidden,
                           .h_gates = product.gates(),
                           .x_stride = gates * hidden,
                           .h_stride = product.stride(),
                           .hidden = hidden,
                           .h = state,
                           .c = c0 ? static_cast<float*>(c.mutable_data_ptr()) : nullptr,
                           .y = y + steps.offset[t] * hidden};
    product.read_state(state, rows);
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        char* mine = scratch.get() + chunk * scratch_bytes;
        if (chunks == 1) {
          product.multiply(rows, 0, shape.panels(), mine);
          step_cell(cell, step, rows, 0, hidden);
          continue;
        }
        const int64_t unit_begin = tiles * chunk / chunks * unit_tile;
        const int64_t unit_end = std::min(tiles * (chunk + 1) / chunks * unit_tile, hidden);
        for (int64_t gate = 0; gate < gates; ++gate) {
          product.multiply(rows, (gate * hidden + unit_begin) / kPanel, (gate * hidden + unit_end) / kPanel, mine);
        }
        step_cell(cell, step, rows, unit_begin, unit_end);
      }
    });
  }
  return {output, h, c};
}

std::tuple<Tensor, Tensor> recurrent_cell(Tensor x_gates, Tensor h_gates, OptionalTensor state, int64_t cell_index) {
  const Cell cell = cell_of(cell_index);
  check_type(x_gates, ScalarType::Float, "x_gates");
  check_type(h_gates, ScalarType::Float, "h_gates");
  const int64_t dim = x_gates.dim(), gates = gates_of(cell);
  check(dim >= 1 && x_gates.size(dim - 1) % gates == 0, "x_gates must have ", gates, " gates in its last dimension");
  std::vector<int64_t> sizes(x_gates.sizes().begin(), x_gates.sizes().end());
  const auto same_sizes = [&](const Tensor& tensor) {
    return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin(), tensor.sizes().end());
  };
  check(same_sizes(h_gates), "h_gates must have the shape of x_gates");
  const int64_t hidden = sizes.back() /= gates;
  check(state.has_value() == (cell == Cell::kLstm || cell == Cell::kGru),
        "an LSTM and a GRU need a state, an RNN has none");
  if (state) {
    check_type(*state, ScalarType::Float, "state");
    check(same_sizes(*state), "state must have the shape of x_gates with ", hidden, " columns");
  }
  const Tensor x = as_contiguous(x_gates), g = as_contiguous(h_gates);
  // The kernel overwrites the states it is given: a GRU's h, an LSTM's c.
  Tensor h = cell == Cell::kGru ? copy_of(*state) : new_tensor(x, sizes, ScalarType::Float);
  Tensor c = cell == Cell::kLstm ? copy_of(*state) : new_tensor(x, {0}, ScalarType::Float);
  auto* h_data = static_cast<float*>(h.mutable_data_ptr());
  auto* c_data = cell == Cell::kLstm ? static_cast<float*>(c.mutable_data_ptr()) : nullptr;
  const auto step_cell = kernels().recurrent.cell_step;
  const int64_t rows = hidden == 0 ? 0 : h.numel() / hidden;
  parallel_for(rows, kCellGrain / std::max<int64_t>(hidden, 1), [&](int64_t begin, int64_t end) {
    const CellStep step = {.x_gates = floats(x) + begin * gates * hidden,
                           .h_gates = floats(g) + begin * gates * hidden,
                           .x_stride = gates * hidden,
                           .h_stride = gates * hidden,
                           .hidden = hidden,
                           .h = h_data + begin * hidden,
                           .c = c_data == nullptr ? nullptr : c_data + begin * hidden,
                           .y = h_data + begin * hidden};
    step_cell(cell, step, end - begin, 0, hidden);
  });
  return {h, c};
}

}  // namespace halfbyte::ops
