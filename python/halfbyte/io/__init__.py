"""Saving and loading quantized models: `hb.save` and `hb.load_`.

The file
--------
One safetensors file (https://huggingface.co/docs/safetensors). Its tensors are everything a model owns under their qualified
names (`model.layers.0.mlp.up_proj.qweight`), each stored once: parameters, buffers, and the buffers of quantized modules:

- `qweight`, uint8: codes in one of the two layouts of `cpp/include/halfbyte/packing.h`, which do not depend on the CPU;
- `scale`, and for asymmetric formats `zero_point` (uint8): `[G, O]` in the tiles layout, `[O, G]` in the rows layout;
- `codebook`, `[16]` float32, for codebook formats: the value of each code, the last one repeated for codes that do not occur.

No float weight of a quantized module is stored, so nothing can be derived anew from rounded floats. Non-persistent buffers
(rotary tables, masks) are stored too: a model built on the meta device is complete after loading.

The header has one metadata entry, `halfbyte`, whose value is JSON (keys sorted, no spaces):

| key | value |
| --- | --- |
| `format_version` | 1; a reader refuses what is newer |
| `halfbyte_version` | version that wrote the file |
| `modules` | qualified name to `{type, scheme, shape, layout, dtype, bias, geometry}`; its further names to `{same_as}` |
| `in_parts` | name to class name of each module with several weights (`LSTM`) whose parts are in `modules` |
| `folded` | name of each batch normalization that was folded, to the name of the layer that took it in |
| `tensors` | stored name to `{dtype, shape, sha256}`; the digest is over the tensor's bytes, little-endian and row-major |
| `aliases` | other name to stored name, for tensors that are shared (tied weights) |
| `non_persistent` | names of buffers that `state_dict` leaves out |
| `sha256` | digest of this JSON without this key, so that an altered header is found as well |

`type` is `QuantizedLinear`, `QuantizedConv`, `QuantizedEmbedding`, `HalfLinear`, `HalfConv` or `HalfEmbedding`; `scheme` is
`Scheme.to_dict()`; `shape` is `[O, I]`, of a convolution that of its matrix; `layout` is `tiles`, `rows` or null for 16-bit
floats; `dtype` is that of a module's float side; `bias` says whether it has one; `geometry`, of convolutions only, is
`ConvGeometry.to_dict()`. There is one metadata entry, since safetensors keeps several in no fixed order, and equal models
give equal files.
"""

from halfbyte.io.loading import load_
from halfbyte.io.saving import save

__all__ = ["load_", "save"]
