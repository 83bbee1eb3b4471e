// recurrent: all steps of one layer in one direction, given the input half of its gates. recurrent_cell: one step,
// given both halves.
//
// A step quantizes (or pads) the hidden state, multiplies it by the weights of all gates and applies the gates. Units
// of the hidden state are split over threads, each with the same units of every gate; each thread quantizes the whole
// state for itself. So threads wait for one another once a step (step_team.h). The state before a step is the output of
// the step before, or h0.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "asymmetric_rows.h"
#include "halfbyte/dispatch.h"
#include "step_team.h"
#include "tensor_checks.h"

namespace halfbyte::ops {
namespace {

constexpr int64_t kChunkBytes = 1 << 17;  // weights that a thread reads in a step at least, counted once every 4 rows
constexpr int64_t kTilesAtOnce = 2;       // of units, whose gates follow their products
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
  Tensor copy = new_tensor(tensor.sizes(), ScalarType::Float);
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

// How the rows that a weight multiplies are read: as floats, or as int8 codes whose scale is given, or found for each
// row, with a zero point if `asymmetric`.
struct Activation {
  bool int8 = false;
  bool asymmetric = false;
  float scale = 0.f;  // 0: found for each row
  int32_t zero_point = 0;

  Activation(bool int8_, bool asymmetric_, const OptionalTensor& act_scale, const OptionalTensor& act_zero_point)
      : int8(int8_), asymmetric(asymmetric_) {
    check(!asymmetric || (int8 && !act_scale), "asymmetric is for int8 scales that are found at run time");
    check(!act_zero_point || act_scale, "act_zero_point needs act_scale");
    check(!act_scale || int8, "act_scale needs int8");
    if (act_scale) {
      check_type(*act_scale, ScalarType::Float, "act_scale");
      check(act_scale->numel() == 1, "act_scale must have one element");
      scale = *floats(*act_scale);
      check(scale > 0.f && std::isfinite(scale), "act_scale=", scale, " is not positive and finite");
    }
    if (act_zero_point) {
      check_type(*act_zero_point, ScalarType::Int, "act_zero_point");
      check(act_zero_point->numel() == 1, "act_zero_point must have one element");
      zero_point = *static_cast<const int32_t*>(act_zero_point->const_data_ptr());
      check(zero_point >= -128 && zero_point <= 127, "act_zero_point=", zero_point, " is not in [-128, 127]");
    }
  }
};

// The weights of the hidden state or of its projection, checked against its size.
class HiddenWeight {
 public:
  HiddenWeight(const Tensor& qweight, const Tensor& scale, const OptionalTensor& zero_point, const OptionalTensor& bias,
               const OptionalTensor& codebook, int64_t out_features, int64_t in_features, int64_t bits,
               int64_t group_size, const Activation& activation)
      : qweight_(as_contiguous(qweight)), scale_(as_contiguous(scale)), activation_(activation) {
    check(!codebook || !activation.int8, "a codebook needs float activations");
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
    if (activation.asymmetric) sum_weights();
  }

  const TiledWeight& get() const { return weight_; }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
  const Activation& activation() const { return activation_; }
  const float* sums() const { return sums_.data(); }  // what a row of ones gives, for asymmetric rows

 private:
  void sum_weights() {
    const TileShape& shape = weight_.shape;
    const Buffer codes = aligned_bytes(code_stride(shape));
    const Buffer scratch = aligned_bytes(kernels().matmul.scratch_bytes(shape));
    std::vector<int32_t> chunk_sums(static_cast<size_t>(shape.groups() * chunks_per_group(shape)));
    float scale = 0.f;
    const QuantizedRows ones = {reinterpret_cast<int8_t*>(codes.get()), &scale, chunk_sums.data(), 0};
    quantize_ones(0, shape, ones);
    sums_.resize(static_cast<size_t>(shape.out_features));
    kernels().matmul.matmul_int8(weight_, ones, 0, 1, 0, shape.panels(), nullptr, sums_.data(), shape.out_features,
                                 scratch.get());
  }

  Tensor qweight_, scale_;
  Activation activation_;
  OptionalTensor zero_point_;
  std::vector<float> bias_, sums_;
  TiledWeight weight_;
};

// One thread's copy of some rows as a product reads them, and room for the product.
class RowsProduct {
 public:
  RowsProduct(const HiddenWeight& weight, int64_t rows) : weight_(&weight), shape_(weight.get().shape) {
    const Activation& activation = weight.activation();
    const int64_t chunks = shape_.groups() * chunks_per_group(shape_);
    codes_ = aligned_bytes(rows * (activation.int8 ? code_stride(shape_) : float_stride(shape_) * 4));
    sums_ = aligned_bytes(rows * std::max(chunks, shape_.groups()) * 4);
    scales_.resize(static_cast<size_t>(rows));
    if (activation.asymmetric) qparams_.resize(static_cast<size_t>(rows));
    scratch_ = aligned_bytes(kernels().matmul.scratch_bytes(shape_));
    rows_ = {reinterpret_cast<int8_t*>(codes_.get()), scales_.data(), reinterpret_cast<int32_t*>(sums_.get()),
             activation.zero_point};
  }

  // Rows [begin, end) of x `[*, in_features]`.
  void read(const float* x, int64_t begin, int64_t end) {
    const MatmulKernels& matmul = kernels().matmul;
    const Activation& activation = weight_->activation();
    if (!activation.int8) {
      matmul.pad_rows(x, shape_.in_features, begin, end, shape_, reinterpret_cast<float*>(codes_.get()),
                      reinterpret_cast<float*>(sums_.get()));
    } else if (activation.asymmetric) {
      quantize_rows_asymmetric(x, shape_.in_features, begin, end, shape_, rows_, qparams_.data());
    } else if (activation.scale > 0.f) {
      matmul.quantize_rows_static(x, shape_.in_features, begin, end, shape_, activation.scale, rows_);
    } else {
      matmul.quantize_rows_dynamic(x, shape_.in_features, begin, end, shape_, rows_);
    }
  }

  void multiply(int64_t rows, int64_t panel_begin, int64_t panel_end, float* y, int64_t ldy) {
    const MatmulKernels& matmul = kernels().matmul;
    if (weight_->activation().asymmetric) {
      matmul.matmul_int8(weight_->get(), rows_, 0, rows, panel_begin, panel_end, nullptr, y, ldy, scratch_.get());
      const int64_t end = std::min(panel_end * kPanel, shape_.out_features);
      for (int64_t row = 0; row < rows; ++row) {
        float* own = y + row * ldy;
        finish_row(own, weight_->sums(), qparams_[static_cast<size_t>(row)], weight_->bias(), own, panel_begin * kPanel,
                   end);
      }
    } else if (weight_->activation().int8) {
      matmul.matmul_int8(weight_->get(), rows_, 0, rows, panel_begin, panel_end, weight_->bias(), y, ldy,
                         scratch_.get());
    } else {
      matmul.matmul_float(weight_->get(), reinterpret_cast<const float*>(codes_.get()),
                          reinterpret_cast<const float*>(sums_.get()), 0, rows, panel_begin, panel_end, weight_->bias(),
                          y, ldy, scratch_.get());
    }
  }

 private:
  const HiddenWeight* weight_;
  TileShape shape_;
  Buffer codes_, sums_, scratch_;
  std::vector<float> scales_;
  std::vector<RowQparams> qparams_;
  QuantizedRows rows_;
};

// The steps in the order in which they run, with the rows of each: all of them, or those that a packed sequence's
// batch_sizes say.
struct Step {
  int64_t rows, offset;  // offset: rows of the steps that lie before it in memory
};

class Steps {
 public:
  Steps(const Tensor& x_gates, const OptionalTensor& batch_sizes, int64_t batch, bool reverse) {
    read(x_gates, batch_sizes, batch);
    if (reverse) std::reverse(steps_.begin(), steps_.end());
  }
  int64_t count() const { return static_cast<int64_t>(steps_.size()); }
  const Step& operator[](int64_t i) const { return steps_[static_cast<size_t>(i)]; }
  // Rows of step i that go on from the step before; the others begin.
  int64_t going_on(int64_t i) const { return i == 0 ? 0 : std::min((*this)[i - 1].rows, (*this)[i].rows); }

 private:
  void read(const Tensor& x_gates, const OptionalTensor& batch_sizes, int64_t batch) {
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
    check(total_ == x_gates.size(0), "batch_sizes add up to ", total_, " but x_gates has ", x_gates.size(0), " rows");
  }

  void add(int64_t rows) {
    steps_.push_back({rows, total_});
    total_ += rows;
  }

  std::vector<Step> steps_;
  int64_t total_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> recurrent(Tensor x_gates, Tensor h0, OptionalTensor c0, Tensor qweight, Tensor scale,
                                             OptionalTensor zero_point, OptionalTensor bias, int64_t cell_index,
                                             int64_t bits, int64_t group_size, bool int8, OptionalTensor act_scale,
                                             OptionalTensor act_zero_point, bool reverse, OptionalTensor batch_sizes,
                                             OptionalTensor codebook, OptionalTensor proj_qweight,
                                             OptionalTensor proj_scale, OptionalTensor proj_zero_point,
                                             int64_t proj_bits, int64_t proj_group_size, bool proj_int8,
                                             OptionalTensor proj_act_scale, OptionalTensor proj_act_zero_point,
                                             OptionalTensor proj_codebook, bool asymmetric, bool proj_asymmetric) {
  const Cell cell = cell_of(cell_index);
  check_type(x_gates, ScalarType::Float, "x_gates");
  check_type(h0, ScalarType::Float, "h0");
  check(h0.dim() == 2, "h0 must have the shape (batch, state)");
  check(proj_qweight.has_value() == proj_scale.has_value(), "proj_qweight and proj_scale need one another");
  check(!proj_qweight || cell == Cell::kLstm, "only an LSTM has a projection");
  const int64_t batch = h0.size(0), width = h0.size(1), gates = gates_of(cell);
  const int64_t columns = x_gates.dim() >= 2 ? x_gates.size(x_gates.dim() - 1) : 0;
  check(columns > 0 && columns % gates == 0, "x_gates must have two dimensions at least and ", gates, " gates");
  const int64_t hidden = columns / gates;
  check(width > 0 && (width == hidden || proj_qweight), "x_gates must have ", gates * width, " columns");
  check(c0.has_value() == (cell == Cell::kLstm), "an LSTM needs c0, other cells have none");
  if (c0) {
    check_type(*c0, ScalarType::Float, "c0");
    check_shape(*c0, {batch, hidden}, "c0");
  }
  const Steps steps(x_gates, batch_sizes, batch, reverse);
  const HiddenWeight weight(qweight, scale, zero_point, bias, codebook, columns, width, bits, group_size,
                            Activation(int8, asymmetric, act_scale, act_zero_point));
  std::optional<HiddenWeight> projection;
  if (proj_qweight) {
    projection.emplace(*proj_qweight, *proj_scale, proj_zero_point, std::nullopt, proj_codebook, width, hidden,
                       proj_bits, proj_group_size,
                       Activation(proj_int8, proj_asymmetric, proj_act_scale, proj_act_zero_point));
  }

  const Tensor x = as_contiguous(x_gates), first = as_contiguous(h0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = width;
  Tensor output = new_tensor(sizes, ScalarType::Float);
  Tensor c = c0 ? copy_of(*c0) : new_tensor({0}, ScalarType::Float);
  auto* c_data = c0 ? static_cast<float*>(c.mutable_data_ptr()) : nullptr;
  auto* y = static_cast<float*>(output.mutable_data_ptr());

  const TileShape& shape = weight.get().shape;
  const auto step_cell = kernels().recurrent.cell_step;
  // A unit's gates lie in panels of their own only where `hidden` fills whole panels; else one thread does it all.
  const int64_t unit_tile = hidden % kPanel == 0 ? kernels().matmul.panels_per_tile * kPanel : hidden;
  const int64_t tiles = ceil_div(hidden, unit_tile);
  const int64_t work = shape.panels() * shape.panel_bytes() * ceil_div(batch, 4);
  const int64_t chunks =
      std::clamp<int64_t>(work / kChunkBytes, 1, std::min<int64_t>(tiles, torch::stable::get_num_threads()));
  const int64_t stride = shape.panels() * kPanel;
  const Buffer h_gates = aligned_bytes(batch * stride * static_cast<int64_t>(sizeof(float)));
  const Buffer unprojected = aligned_bytes(projection ? batch * hidden * static_cast<int64_t>(sizeof(float)) : 0);
  auto* product = reinterpret_cast<float*>(h_gates.get());
  auto* unprojected_h = reinterpret_cast<float*>(unprojected.get());
  std::vector<RowsProduct> gate_products, projections;
  for (int64_t i = 0; i < chunks; ++i) {
    gate_products.emplace_back(weight, batch);
    if (projection) projections.emplace_back(*projection, batch);
  }
  const auto output_of = [&](int64_t i) { return y + steps[i].offset * width; };

  const auto read_state = [&](int64_t i, int64_t member) {
    RowsProduct& own = gate_products[static_cast<size_t>(member)];
    const int64_t going_on = steps.going_on(i);
    if (going_on > 0) own.read(output_of(i - 1), 0, going_on);
    own.read(floats(first), going_on, steps[i].rows);
  };
  // Units [begin, end) of step i: their products, gate by gate, and their gates.
  const auto run_tiles = [&](int64_t i, RowsProduct& own, int64_t begin, int64_t end) {
    const int64_t rows = steps[i].rows, going_on = steps.going_on(i);
    const float* x_rows = floats(x) + steps[i].offset * columns;
    if (end - begin == hidden) {
      own.multiply(rows, 0, shape.panels(), product, stride);
    } else {
      for (int64_t g = 0; g < gates; ++g) {
        const int64_t gate = i % 2 == 0 ? g : gates - 1 - g;
        own.multiply(rows, (gate * hidden + begin) / kPanel, (gate * hidden + end) / kPanel, product, stride);
      }
    }
    const auto apply = [&](const float* before, int64_t row, int64_t row_end) {
      const CellStep step = {.x_gates = x_rows + row * columns,
                             .h_gates = product + row * stride,
                             .x_stride = columns,
                             .h_stride = stride,
                             .hidden = hidden,
                             .h = before + row * width,
                             .c = c_data == nullptr ? nullptr : c_data + row * hidden,
                             .y = (projection ? unprojected_h : output_of(i)) + row * hidden};
      step_cell(cell, step, row_end - row, begin, end);
    };
    if (going_on > 0) apply(output_of(i - 1), 0, going_on);
    if (going_on < rows) apply(floats(first), going_on, rows);
  };
  // Few rows are bound by reading the weights: some tiles at a time, every other step backwards, since what the step
  // before read last is still in the cache. More rows go through blocks of weights, which ask for those that follow.
  const auto run_units = [&](int64_t i, int64_t chunk, int64_t member) {
    RowsProduct& own = gate_products[static_cast<size_t>(member)];
    const int64_t tile_begin = tiles * chunk / chunks, tile_end = tiles * (chunk + 1) / chunks;
    const int64_t count = steps[i].rows <= kernels().matmul.rows_per_tile ? kTilesAtOnce : tile_end - tile_begin;
    for (int64_t done = tile_begin; done < tile_end; done += count) {
      const int64_t next = std::min(done + count, tile_end);
      const int64_t begin = i % 2 == 0 ? done : tile_begin + tile_end - next;
      run_tiles(i, own, begin * unit_tile, std::min((begin + next - done) * unit_tile, hidden));
    }
  };
  if (projection) {
    const int64_t panels = projection->get().shape.panels();
    // Two steps for each: the units, then their projection, which reads all of them.
    StepTeam(2 * steps.count(), chunks)
        .run(
            [&](int64_t step, int64_t member) {
              if (step % 2 == 0) return read_state(step / 2, member);
              projections[static_cast<size_t>(member)].read(unprojected_h, 0, steps[step / 2].rows);
            },
            [&](int64_t step, int64_t chunk, int64_t member) {
              if (step % 2 == 0) return run_units(step / 2, chunk, member);
              projections[static_cast<size_t>(member)].multiply(steps[step / 2].rows, panels * chunk / chunks,
                                                                panels * (chunk + 1) / chunks, output_of(step / 2),
                                                                width);
            });
  } else {
    StepTeam(steps.count(), chunks).run(read_state, run_units);
  }

  // A row's last state is the output of its last step.
  Tensor h = copy_of(h0);
  auto* last = static_cast<float*>(h.mutable_data_ptr());
  for (int64_t i = 0; i < steps.count(); ++i) {
    const int64_t ending = i + 1 < steps.count() ? steps[i + 1].rows : 0;
    for (int64_t row = ending; row < steps[i].rows; ++row) {
      std::copy_n(output_of(i) + row * width, width, last + row * width);
    }
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
  OptionalTensor before;
  if (cell == Cell::kGru) before.emplace(as_contiguous(*state));
  Tensor h = new_tensor(sizes, ScalarType::Float);
  Tensor c = cell == Cell::kLstm ? copy_of(*state) : new_tensor({0}, ScalarType::Float);
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
                           .h = before ? floats(*before) + begin * hidden : nullptr,
                           .c = c_data == nullptr ? nullptr : c_data + begin * hidden,
                           .y = h_data + begin * hidden};
    step_cell(cell, step, end - begin, 0, hidden);
  });
  return {h, c};
}

}  // namespace halfbyte::ops
