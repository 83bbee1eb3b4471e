"""Python's own ways to copy a quantized model: pickle, deepcopy, state dicts. Bits and ties stay."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_models import SCHEMES, Net, indices, meta_net, quantized_net, save_to
from torch import nn

import halfbyte as hb


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    other = Net().eval()
    scheme = next(m.scheme for m in (model.second, model.first))
    hb.quantize_(other, scheme, progress=False, on_fallback="allow")
    other.load_state_dict(model.state_dict())
    other.angles = model.angles
    return other


def through_safe_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        through_torch_save,
        through_state_dict,
        through_safe_torch_save,
    ],
    ids=["deepcopy", "pickle", "torch.save", "state_dict", "state_dict file"],
)
def test_copies_give_the_same_bits_and_keep_ties(copied: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = quantized_net(SCHEMES[name])
    other = copied(model)
    assert torch.equal(other(indices()), model(indices()))
    if not isinstance(SCHEMES[name].weight, hb.FloatFormat):
        assert other.head.qweight is other.table.qweight
        assert other.head.qweight is not model.head.qweight
    else:
        assert other.head.weight is other.table.weight
    assert other.first is other.again


def test_state_dict_can_be_assigned_on_a_loaded_skeleton(tmp_path: Path) -> None:
    model = quantized_net(SCHEMES["int8_dynamic"])
    other = hb.load_(meta_net(), save_to(tmp_path, model))
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(indices()), model(indices()))
