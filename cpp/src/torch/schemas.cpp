// Every operator's schema, in one library block. The only other place an operator is described is its Python wrapper.
#include <torch/csrc/stable/library.h>

#include "ops.h"

using namespace halfbyte::ops;

STABLE_TORCH_LIBRARY(halfbyte, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis, int? group_size) -> "
      "Tensor");
  m.def(
      "fake_quantize_train(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis, int? group_size) "
      "-> (Tensor, Tensor)");
  m.def("fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor");
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis, int? group_size) -> Tensor");
  m.def(
      "dequantize(Tensor q, Tensor scale, Tensor zero_point, int? axis, int? group_size, ScalarType dtype) -> Tensor");
  m.def("observe_minmax(Tensor x, int? axis, int? group_size) -> (Tensor, Tensor)");
  m.def(
      "search_qparams(Tensor w, Tensor? importance, int bits, bool symmetric, bool narrow_range, int group_size, "
      "int grid, float max_shrink, ScalarType scale_dtype, Tensor? codebook=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quantize_learned(Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, int? axis, "
      "int? group_size, int estimator, float grad_factor) -> Tensor");
  m.def(
      "fake_quantize_learned_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax, "
      "int? axis, int? group_size, int estimator, float grad_factor) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fake_quantize_codebook(Tensor x, Tensor scale, Tensor values, int group_size, bool binary, float clip_low, "
      "float clip_high, float grad_factor) -> Tensor");
  m.def(
      "fake_quantize_codebook_backward(Tensor grad, Tensor x, Tensor scale, Tensor values, int group_size, bool "
      "binary, "
      "float clip_low, float clip_high, float grad_factor) -> (Tensor, Tensor)");
  m.def("histogram_update_(Tensor(a!) counts, Tensor x, float low, float high) -> Tensor");
  m.def("search_histogram(Tensor counts, float low, float high, int qmin, int qmax, bool symmetric) -> Tensor");
  m.def("advise_huge_pages_(Tensor(a!) x) -> ()");
  m.def("pack(Tensor codes, int bits) -> Tensor");
  m.def("unpack(Tensor packed, int bits, int length, bool signed) -> Tensor");
  m.def("pack_tiles(Tensor codes, int bits, int group_size) -> Tensor");
  m.def(
      "unpack_tiles(Tensor packed, int bits, int out_features, int in_features, int group_size, bool signed) -> "
      "Tensor");
  m.def(
      "linear_weight_only(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, "
      "int out_features, int group_size, Tensor? codebook=None) -> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, "
      "int out_features, int group_size, Tensor? act_scale, Tensor? act_zero_point, bool asymmetric=False) -> Tensor");
  m.def(
      "conv_int8(Tensor x, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int out_channels, "
      "int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int[] output_padding, "
      "int groups, bool transposed, Tensor? act_scale, Tensor? act_zero_point, Tensor? out_scale, "
      "Tensor? out_zero_point, int out_min, int out_max, Tensor? residual, Tensor? residual_scale, "
      "Tensor? residual_zero_point) -> Tensor");
  m.def(
      "run_program(Tensor[] inputs, Tensor[] constants, Tensor steps, Tensor numbers, int arena, int[] outputs) -> "
      "Tensor[]");
  m.def(
      "embedding_weight_only(Tensor indices, Tensor qweight, Tensor scale, Tensor? zero_point, int bits, "
      "int num_embeddings, int embedding_dim, int group_size, bool tiled, ScalarType dtype, Tensor? codebook=None) "
      "-> Tensor");
  m.def("hessian_update_(Tensor(a!) tiles, Tensor x) -> ()");
  m.def("hessian_matrix(Tensor tiles, int features) -> Tensor");
  m.def(
      "gptq_round(Tensor weight, Tensor factor, Tensor order, Tensor? scale, Tensor? zero_point, Tensor? importance, "
      "int bits, bool symmetric, bool narrow_range, int group_size, int grid, float max_shrink, ScalarType "
      "scale_dtype, Tensor? codebook=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cross_hessian_update_(Tensor(a!) matrix, Tensor y, Tensor x) -> ()");
  m.def(
      "gptq_polish(Tensor weight, Tensor hessian, Tensor codes, Tensor scale, Tensor zero_point, int bits, bool "
      "symmetric, bool narrow_range, int group_size, int sweeps, bool refit, ScalarType scale_dtype) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "recurrent(Tensor x_gates, Tensor h0, Tensor? c0, Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? "
      "bias, "
      "int cell, int bits, int group_size, bool int8, Tensor? act_scale, Tensor? act_zero_point, bool reverse, "
      "Tensor? batch_sizes, Tensor? codebook, Tensor? proj_qweight, Tensor? proj_scale, Tensor? proj_zero_point, int "
      "proj_bits, "
      "int proj_group_size, bool proj_int8, Tensor? proj_act_scale, Tensor? proj_act_zero_point, Tensor? "
      "proj_codebook, bool asymmetric=False, bool proj_asymmetric=False) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("attention_scores_int8(Tensor query, Tensor key) -> Tensor");
  m.def("attention_values_int8(Tensor weights, Tensor value) -> Tensor");
  m.def("recurrent_cell(Tensor x_gates, Tensor h_gates, Tensor? state, int cell) -> (Tensor, Tensor)");
  m.def(
      "embedding_bag_weight_only(Tensor indices, Tensor offsets, Tensor? per_sample_weights, Tensor qweight, Tensor "
      "scale, "
      "Tensor? zero_point, int bits, int num_embeddings, int embedding_dim, int group_size, bool tiled, int mode, "
      "bool include_last_offset, int? padding_idx, ScalarType dtype, Tensor? codebook=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(halfbyte, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  m.impl("fake_quantize_train", TORCH_BOX(&fake_quantize_train));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("search_qparams", TORCH_BOX(&search_qparams));
  m.impl("fake_quantize_learned", TORCH_BOX(&fake_quantize_learned));
  m.impl("fake_quantize_learned_backward", TORCH_BOX(&fake_quantize_learned_backward));
  m.impl("fake_quantize_codebook", TORCH_BOX(&fake_quantize_codebook));
  m.impl("fake_quantize_codebook_backward", TORCH_BOX(&fake_quantize_codebook_backward));
  m.impl("histogram_update_", TORCH_BOX(&histogram_update_));
  m.impl("search_histogram", TORCH_BOX(&search_histogram));
  m.impl("advise_huge_pages_", TORCH_BOX(&advise_huge_pages_));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("pack_tiles", TORCH_BOX(&pack_tiles));
  m.impl("unpack_tiles", TORCH_BOX(&unpack_tiles));
  m.impl("linear_weight_only", TORCH_BOX(&linear_weight_only));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("conv_int8", TORCH_BOX(&conv_int8));
  m.impl("run_program", TORCH_BOX(&run_program));
  m.impl("embedding_weight_only", TORCH_BOX(&embedding_weight_only));
  m.impl("hessian_update_", TORCH_BOX(&hessian_update_));
  m.impl("hessian_matrix", TORCH_BOX(&hessian_matrix));
  m.impl("gptq_round", TORCH_BOX(&gptq_round));
  m.impl("cross_hessian_update_", TORCH_BOX(&cross_hessian_update_));
  m.impl("gptq_polish", TORCH_BOX(&gptq_polish));
  m.impl("recurrent", TORCH_BOX(&recurrent));
  m.impl("attention_scores_int8", TORCH_BOX(&attention_scores_int8));
  m.impl("attention_values_int8", TORCH_BOX(&attention_values_int8));
  m.impl("recurrent_cell", TORCH_BOX(&recurrent_cell));
  m.impl("embedding_bag_weight_only", TORCH_BOX(&embedding_bag_weight_only));
}
