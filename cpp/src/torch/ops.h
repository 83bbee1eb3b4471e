// The operators behind torch.ops.halfbyte.*: unwrap tensors, check, allocate, call a kernel in parallel, wrap.
// schemas.cpp registers them; docstrings and user-facing argument checks live in python/halfbyte/ops/.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace halfbyte::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// elementwise_ops.cpp
Tensor fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                     OptionalInt group_size);
std::tuple<Tensor, Tensor> fake_quantize_train(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax,
                                               OptionalInt axis, OptionalInt group_size);
Tensor fake_quantize_backward(Tensor grad, Tensor mask);
Tensor quantize(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                OptionalInt group_size);
Tensor dequantize(Tensor q, Tensor scale, Tensor zero_point, OptionalInt axis, OptionalInt group_size,
                  torch::headeronly::ScalarType dtype);
std::tuple<Tensor, Tensor> observe_minmax(Tensor x, OptionalInt axis, OptionalInt group_size);
std::tuple<Tensor, Tensor, Tensor> search_qparams(Tensor w, OptionalTensor importance, int64_t bits, bool symmetric,
                                                  bool narrow_range, int64_t group_size, int64_t grid,
                                                  double max_shrink, torch::headeronly::ScalarType scale_dtype,
                                                  OptionalTensor codebook);

// training_ops.cpp
Tensor fake_quantize_learned(Tensor x, Tensor scale, Tensor zero_point, int64_t qmin, int64_t qmax, OptionalInt axis,
                             OptionalInt group_size, int64_t estimator, double grad_factor);
std::tuple<Tensor, Tensor, Tensor> fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale,
                                                                  Tensor zero_point, int64_t qmin, int64_t qmax,
                                                                  OptionalInt axis, OptionalInt group_size,
                                                                  int64_t estimator, double grad_factor);
Tensor fake_quantize_codebook(Tensor x, Tensor scale, Tensor values, int64_t group_size, bool binary, double clip_low,
                              double clip_high, double grad_factor);
std::tuple<Tensor, Tensor> fake_quantize_codebook_backward(Tensor grad, Tensor x, Tensor scale, Tensor values,
                                                           int64_t group_size, bool binary, double clip_low,
                                                           double clip_high, double grad_factor);

// histogram_ops.cpp: returns the number of NaN; if there are any, counts stay as they are.
Tensor histogram_update_(Tensor counts, Tensor x, double low, double high);
// [3]: ends of the range and its mean squared error.
Tensor search_histogram(Tensor counts, double low, double high, int64_t qmin, int64_t qmax, bool symmetric);

// packing_ops.cpp
void advise_huge_pages_(Tensor x);
Tensor pack(Tensor codes, int64_t bits);
Tensor unpack(Tensor packed, int64_t bits, int64_t length, bool is_signed);
Tensor pack_tiles(Tensor codes, int64_t bits, int64_t group_size);
Tensor unpack_tiles(Tensor packed, int64_t bits, int64_t out_features, int64_t in_features, int64_t group_size,
                    bool is_signed);

// linear_ops.cpp
Tensor linear_weight_only(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias,
                          int64_t bits, int64_t out_features, int64_t group_size, OptionalTensor codebook);
Tensor linear_int8(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias, int64_t bits,
                   int64_t out_features, int64_t group_size, OptionalTensor act_scale, OptionalTensor act_zero_point,
                   bool asymmetric);

// conv_ops.cpp: spatial lists have one entry a dimension, padding two (all befores, then all afters).
struct ConvGeometry {
  std::vector<int64_t> kernel_size, stride, padding, dilation, output_padding;
  int64_t groups;
  bool transposed;
};
Tensor conv_int8(Tensor x, Tensor qweight, Tensor scale, OptionalTensor zero_point, OptionalTensor bias, int64_t bits,
                 int64_t out_channels, int64_t group_size, std::vector<int64_t> kernel_size,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                 std::vector<int64_t> output_padding, int64_t groups, bool transposed, OptionalTensor act_scale,
                 OptionalTensor act_zero_point, OptionalTensor out_scale, OptionalTensor out_zero_point,
                 int64_t out_min, int64_t out_max, OptionalTensor residual, OptionalTensor residual_scale,
                 OptionalTensor residual_zero_point);

// program_ops.cpp: the integer part of a lowered model; lowering/program.py writes `steps` and `numbers`.
std::vector<Tensor> run_program(std::vector<Tensor> inputs, std::vector<Tensor> constants, Tensor steps, Tensor numbers,
                                int64_t arena, std::vector<int64_t> outputs);

// embedding_ops.cpp: `tiled` says which layout qweight is in (a table shared with the output head is tiled).
Tensor embedding_weight_only(Tensor indices, Tensor qweight, Tensor scale, OptionalTensor zero_point, int64_t bits,
                             int64_t num_embeddings, int64_t embedding_dim, int64_t group_size, bool tiled,
                             torch::headeronly::ScalarType dtype, OptionalTensor codebook);

// gptq_ops.cpp: `tiles` is the lower triangle of a Hessian as gptq.h stores it.
void hessian_update_(Tensor tiles, Tensor x);
Tensor hessian_matrix(Tensor tiles, int64_t features);
std::tuple<Tensor, Tensor, Tensor, Tensor> gptq_round(Tensor weight, Tensor factor, Tensor order, OptionalTensor scale,
                                                      OptionalTensor zero_point, OptionalTensor importance,
                                                      int64_t bits, bool symmetric, bool narrow_range,
                                                      int64_t group_size, int64_t grid, double max_shrink,
                                                      torch::headeronly::ScalarType scale_dtype,
                                                      OptionalTensor codebook);

void cross_hessian_update_(Tensor matrix, Tensor y, Tensor x);

// polish_ops.cpp
std::tuple<Tensor, Tensor, Tensor> gptq_polish(Tensor weight, Tensor hessian, Tensor codes, Tensor scale,
                                               Tensor zero_point, int64_t bits, bool symmetric, bool narrow_range,
                                               int64_t group_size, int64_t sweeps, bool refit,
                                               torch::headeronly::ScalarType scale_dtype);

// recurrent_ops.cpp: `cell` is a Cell of recurrent.h; the last result is the cell state, empty where there is none. The
// state of one step is an LSTM's cell state or a GRU's hidden state. `proj_*`: an LSTM's projection, if it has one.
std::tuple<Tensor, Tensor, Tensor> recurrent(Tensor x_gates, Tensor h0, OptionalTensor c0, Tensor qweight, Tensor scale,
                                             OptionalTensor zero_point, OptionalTensor bias, int64_t cell, int64_t bits,
                                             int64_t group_size, bool int8, OptionalTensor act_scale,
                                             OptionalTensor act_zero_point, bool reverse, OptionalTensor batch_sizes,
                                             OptionalTensor codebook, OptionalTensor proj_qweight,
                                             OptionalTensor proj_scale, OptionalTensor proj_zero_point,
                                             int64_t proj_bits, int64_t proj_group_size, bool proj_int8,
                                             OptionalTensor proj_act_scale, OptionalTensor proj_act_zero_point,
                                             OptionalTensor proj_codebook, bool asymmetric, bool proj_asymmetric);
Tensor attention_scores_int8(Tensor query, Tensor key);
Tensor attention_values_int8(Tensor weights, Tensor value);
std::tuple<Tensor, Tensor> recurrent_cell(Tensor x_gates, Tensor h_gates, OptionalTensor state, int64_t cell);

// embedding_bag_ops.cpp: mode is 0 sum, 1 mean, 2 max.
Tensor embedding_bag_weight_only(Tensor indices, Tensor offsets, OptionalTensor per_sample_weights, Tensor qweight,
                                 Tensor scale, OptionalTensor zero_point, int64_t bits, int64_t num_embeddings,
                                 int64_t embedding_dim, int64_t group_size, bool tiled, int64_t mode,
                                 bool include_last_offset, OptionalInt padding_idx, torch::headeronly::ScalarType dtype,
                                 OptionalTensor codebook);

}  // namespace halfbyte::ops
