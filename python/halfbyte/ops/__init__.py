"""The operators, for people who build their own layers. Nothing else in the package mentions `torch.ops`."""

from halfbyte.ops.attention import attention_scores_int8, attention_values_int8
from halfbyte.ops.conv import conv_int8, conv_weight_only
from halfbyte.ops.elementwise import (
    dequantize,
    fake_quantize,
    fake_quantize_mask,
    observe_minmax,
    quantize,
    search_qparams,
    straight_through,
)
from halfbyte.ops.embedding import embedding_weight_only
from halfbyte.ops.embedding_bag import BagMode, embedding_bag_weight_only
from halfbyte.ops.gptq import (
    cross_hessian_update_,
    gptq_polish,
    gptq_round,
    hessian_matrix,
    hessian_tiles,
    hessian_update_,
)
from halfbyte.ops.histogram import grow_histogram, histogram_update_, search_histogram
from halfbyte.ops.learned import Estimator, fake_quantize_learned, fake_quantize_learned_gradients
from halfbyte.ops.learned_codebook import (
    fake_quantize_binary,
    fake_quantize_binary_gradients,
    fake_quantize_codebook,
    fake_quantize_codebook_gradients,
)
from halfbyte.ops.linear import linear_int4_int8, linear_int8, linear_weight_only
from halfbyte.ops.packing import Layout, empty_packed, pack, packed_shape, unpack
from halfbyte.ops.program import run_program
from halfbyte.ops.recurrent import Cell, Projection, recurrent, recurrent_cell

__all__ = [
    "BagMode",
    "Cell",
    "Estimator",
    "Layout",
    "Projection",
    "attention_scores_int8",
    "attention_values_int8",
    "conv_int8",
    "conv_weight_only",
    "cross_hessian_update_",
    "dequantize",
    "embedding_bag_weight_only",
    "embedding_weight_only",
    "empty_packed",
    "fake_quantize",
    "fake_quantize_binary",
    "fake_quantize_binary_gradients",
    "fake_quantize_codebook",
    "fake_quantize_codebook_gradients",
    "fake_quantize_learned",
    "fake_quantize_learned_gradients",
    "fake_quantize_mask",
    "gptq_polish",
    "gptq_round",
    "grow_histogram",
    "hessian_matrix",
    "hessian_tiles",
    "hessian_update_",
    "histogram_update_",
    "linear_int4_int8",
    "linear_int8",
    "linear_weight_only",
    "observe_minmax",
    "pack",
    "packed_shape",
    "quantize",
    "recurrent",
    "recurrent_cell",
    "run_program",
    "search_histogram",
    "search_qparams",
    "straight_through",
    "unpack",
]
