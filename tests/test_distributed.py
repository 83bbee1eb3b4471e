"""Two processes, each with half of the data, quantize as one does; what fails in one fails in both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from block_models import Model, data, make
from test_streaming import RECIPE, skeleton, write_shards
from torch import Tensor, nn

import halfbyte as hb


class Routed(nn.Module):
    """Only tokens of one kind reach the expert: none of them on the first process."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        y = self.first(x)
        if chosen.any():
            y = torch.where(chosen[:, None], self.expert(y), y)
        return y


def routed_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Routed(), Routed())


def routed_data() -> list[Tensor]:
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))
    x[:, :, 0] = torch.tensor([-1.0, 1.0])[:, None]
    return [x[0], x[1]]


def quantized(folder: Path, share: slice, **options: object) -> dict[str, dict[str, Tensor]]:
    """State dicts of models quantized in some ways."""
    results: dict[str, dict[str, Tensor]] = {}
    gptq = hb.GPTQ(polish=1)
    for name, algorithms in {"GPTQ": [gptq], "AWQ": [hb.AWQ(tokens=64), gptq], "MSE": [hb.MSE()]}.items():
        model = make()
        hb.quantize_(model, RECIPE, data=data(1)[share], algorithms=algorithms, progress=False, **options)  # type: ignore[arg-type]
        results[name] = copy.deepcopy(model.state_dict())
    model = make()
    recipe = hb.int4_int8_static(16)
    hb.quantize_(model, recipe, data=data(1)[share], algorithms=[gptq], progress=False, **options)  # type: ignore[arg-type]
    results["static"] = model.state_dict()
    model = routed_model()
    recipe = hb.int_weight_only(3, 16)
    hb.quantize_(model, recipe, data=routed_data()[share], algorithms=[gptq], progress=False, **options)  # type: ignore[arg-type]
    results["routed"] = model.state_dict()
    hb.quantize_checkpoint(
        skeleton(),
        folder / "float",
        folder / "out",
        RECIPE,
        data=data(1)[share],
        algorithms=[gptq],
        progress=False,
        **options,
    )  # type: ignore[arg-type]
    results["streamed"] = hb.load_(skeleton(), folder / "out").state_dict()
    return results


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = quantized(Path(folder), slice(rank, None, world), distributed=True)
    bad = make()
    with torch.no_grad():
        bad.layers[1].norm.bias[0] = float("nan") if rank == 1 else 0.0  # type: ignore[union-attr, index, operator]
    message = ""
    try:
        hb.quantize_(bad, RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False, distributed=True)
    except hb.QuantizationError as error:
        message = str(error)
    few = ""
    try:
        batches = [torch.randint(0, 50, (2, 10))]
        hb.quantize_(make(), RECIPE, data=batches, algorithms=[hb.GPTQ()], progress=False, distributed=True)
    except hb.QuantizationError as error:
        few = str(error)
    torch.save((results, message, few), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, dict[str, Tensor]], str, str]]:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "float").mkdir()
    write_shards(make(), folder / "float")
    torch.multiprocessing.spawn(_work, args=(2, str(folder)), nprocs=2)
    alone = folder / "alone"
    alone.mkdir()
    (folder / "float").rename(alone / "float")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)] + [(quantized(alone, slice(None)), "", "")]


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "MSE", "static", "routed", "streamed"])
def test_processes_agree_and_differ_from_one_in_rounding_only(
    outcomes: list[tuple[dict[str, dict[str, Tensor]], str, str]], name: str
) -> None:
    first, second, alone = (results[name] for results, _, _ in outcomes)
    for key, tensor in alone.items():
        assert torch.equal(first[key], second[key]), key
        if tensor.is_floating_point():
            torch.testing.assert_close(first[key], tensor, rtol=2e-3, atol=1e-6)
        else:
            assert (first[key] == tensor).float().mean() > 0.98, key  # a tie may be broken otherwise


def test_what_fails_in_one_process_fails_in_all(outcomes: list[tuple[dict[str, dict[str, Tensor]], str, str]]) -> None:
    assert "layers.1.gate: NaN or inf among its inputs" in outcomes[1][1]
    assert outcomes[0][1] == f"process 1 failed: {outcomes[1][1]}"


def test_tokens_of_all_processes_count(outcomes: list[tuple[dict[str, dict[str, Tensor]], str, str]]) -> None:
    assert "40 tokens of calibration data reached it, fewer than its 64 inputs" in outcomes[0][2]


def test_distributed_needs_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        hb.quantize_(Model(), RECIPE, data=data(1), algorithms=[hb.GPTQ()], progress=False, distributed=True)
