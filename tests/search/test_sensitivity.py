"""The search on small models: what it promises about bytes, budgets, the user's model, files and bad input."""

import copy
import functools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.search import SensitivityWarning
from halfbyte.search.bench import FLOAT, Workbench, module_copy
from halfbyte.search.proxies import proxy_scores
from halfbyte.search.units import find_units

SCHEMES = [hb.int_weight_only(bits, group_size=32) for bits in (8, 4, 2)]


class TiedModel(nn.Module):
    """A language model in small: a table tied to the head, an LSTM, two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.up_proj = nn.Linear(32, 64)
        self.down_proj = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.lstm(self.embed(tokens))[0]
        return self.head(self.norm(x + self.down_proj(self.up_proj(x).relu())))


@pytest.fixture
def model() -> TiedModel:
    torch.manual_seed(0)
    return TiedModel()


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 40, (8, 32)) for _ in range(4)]


@pytest.fixture
def table(model: TiedModel, data: list[Tensor]) -> hb.SensitivityTable:
    return hb.measure_sensitivity(model, data, SCHEMES, progress=False)


def test_units_join_what_shares_a_weight_and_what_the_user_groups(model: TiedModel) -> None:
    units = find_units(model, SCHEMES[0], groups=[("up_proj", "down_proj")])
    assert [unit.modules for unit in units] == [("embed", "head"), ("lstm",), ("up_proj", "down_proj")]
    assert units[0].weights == 40 * 32
    assert units[1].weights == 2 * 4 * 32 * 32
    with pytest.raises(hb.QuantizationError, match=r"group pattern 'q_proj' matches no module"):
        find_units(model, SCHEMES[0], groups=[("q_proj",)])


def test_leaves_the_model_alone(model: TiedModel, data: list[Tensor]) -> None:
    model.train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    hb.measure_sensitivity(model, data, SCHEMES, progress=False).allocate(max_loss=0.01)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(module.training for module in modules)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_module_copy_shares_tensors(model: TiedModel) -> None:
    twin = module_copy(model)
    assert twin.embed.weight is model.embed.weight
    assert twin.head.weight is twin.embed.weight
    assert twin.lstm is not model.lstm


def test_fewer_bits_lose_more(table: hb.SensitivityTable) -> None:
    for row in table.entries.values():
        losses = [row[str(scheme)].loss for scheme in SCHEMES]
        assert losses == sorted(losses)
        assert row[FLOAT].loss == 0.0
    assert "embed (+1)" in str(table)
    assert "<table>" in table._repr_html_()


def test_bytes_are_those_that_are_saved(table: hb.SensitivityTable, model: TiedModel, tmp_path: Path) -> None:
    recipe = table.allocate(max_bytes=12_000)
    assert recipe.bytes <= 12_000
    report = hb.quantize_(model, recipe, progress=False, algorithms=[hb.MSE()])
    assert report.bytes_after == recipe.bytes
    hb.save(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == recipe.bytes  # noqa: SIM118


def test_measured_loss_is_that_of_the_quantized_model(
    table: hb.SensitivityTable, model: TiedModel, data: list[Tensor]
) -> None:
    recipe = table.allocate(max_bytes=12_000, holdout=data[:2])
    original = copy.deepcopy(model)
    hb.quantize_(model, recipe, progress=False, algorithms=[hb.MSE()])
    assert hb.compare(original, model, data, kind="logits").outputs[0].kl == pytest.approx(
        recipe.measured_loss, rel=1e-3
    )
    held_out = hb.compare(original, model, data[:2], kind="logits").outputs[0].kl
    assert held_out == pytest.approx(recipe.held_out_loss, rel=1e-3)


@pytest.mark.parametrize("key", [str(scheme) for scheme in SCHEMES])
def test_is_never_worse_than_uniform(table: hb.SensitivityTable, key: str) -> None:
    budget = table.bytes_of(dict.fromkeys(table.entries, key))
    assert table.allocate(max_bytes=budget).loss <= table.uniform_losses[key]


def test_max_loss_is_kept_with_few_bytes(table: hb.SensitivityTable) -> None:
    middle = table.uniform_losses[str(SCHEMES[1])]
    recipe = table.allocate(max_loss=1.5 * middle)
    assert recipe.measured_loss is not None
    assert recipe.measured_loss <= 1.5 * middle
    assert recipe.bytes <= table.bytes_of(dict.fromkeys(table.entries, str(SCHEMES[1])))
    assert "kept with" in str(recipe)


def test_front_falls(table: hb.SensitivityTable, tmp_path: Path) -> None:
    front = table.pareto(measured=True)
    losses, sizes = [p.loss for p in front.points], [p.bytes for p in front.points]
    assert len(front.points) >= 6
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)
    assert set(front.uniform) == {FLOAT, *map(str, SCHEMES)}
    for uniform in front.uniform.values():
        assert min(p.loss for p in front.points if p.bytes <= uniform.bytes) <= uniform.loss
    front.plot(tmp_path / "front.png", chosen=front.points[2])
    assert (tmp_path / "front.png").stat().st_size > 10_000
    json.dumps(front.to_dict())


def test_pins_ends_and_least_width(table: hb.SensitivityTable) -> None:
    eight, four, two = SCHEMES
    recipe = table.allocate(max_bytes=20_000, pins={"lstm": two}, ends=eight, min_bits=4)
    assert recipe.choices["lstm"] == str(two)
    assert recipe.choices["embed"] == str(eight)
    assert recipe.choices["down_proj"] == str(eight)
    assert recipe.choices["up_proj"] in (str(four), str(eight), FLOAT)
    assert table.allocate(max_bytes=30_000, pins={"*_proj": None}).choices["up_proj"] == FLOAT
    assert table.allocate(max_bytes=30_000, pins={nn.Linear: four}).choices["up_proj"] == str(four)
    with pytest.raises(hb.QuantizationError, match=r"lstm is pinned twice: to int2.* by 'lstm' and to int8.* by LSTM"):
        table.allocate(max_bytes=20_000, pins={"lstm": two, nn.LSTM: eight})
    with pytest.raises(hb.QuantizationError, match=r"down_proj is pinned twice: .* by ends and .* by 'down_proj'"):
        table.allocate(max_bytes=20_000, pins={"down_proj": two}, ends=eight)
    with pytest.raises(TypeError, match=r"3 is neither a name pattern nor a module type"):
        table.allocate(max_bytes=20_000, pins={3: two})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"min_bits=64 is not a width"):
        table.allocate(max_bytes=20_000, min_bits=64)
    with pytest.raises(hb.QuantizationError, match=r"lstm is pinned twice"):
        table.allocate(max_bytes=20_000, pins={"lstm": two, "ls*": eight})
    with pytest.raises(hb.QuantizationError, match=r"'gru' matches no module"):
        table.allocate(max_bytes=20_000, pins={"gru": two})
    with pytest.raises(hb.QuantizationError, match=r"asks for int3 per channel.*not measured at lstm"):
        table.allocate(max_bytes=20_000, pins={"lstm": hb.int_weight_only(3)})


def test_impossible_budgets_name_the_nearest(table: hb.SensitivityTable) -> None:
    with pytest.raises(
        hb.QuantizationError, match=r"no allocation keeps to max_bytes=500; max_bytes=(\d+) would do"
    ) as error:
        table.allocate(max_bytes=500)
    nearest = int(str(error.value).split("; max_bytes=")[1].split()[0])
    assert table.allocate(max_bytes=nearest).bytes <= nearest
    table.measure_latency(seconds=0.5, progress=False)
    with pytest.raises(hb.QuantizationError, match=r"max_latency=1e-09"):
        table.allocate(max_latency=1e-9, max_bytes="20kB")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "no budget"),
        ({"max_bytes": "20 parsecs"}, "is not a positive quantity"),
        ({"max_bytes": -1}, "is not a positive quantity"),
        ({"max_loss": math.nan}, "max_loss=nan"),
    ],
)
def test_budgets_are_checked(table: hb.SensitivityTable, budget: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.allocate(**budget)  # type: ignore[arg-type]


def test_latency_adds_up(table: hb.SensitivityTable) -> None:
    latency = table.measure_latency(seconds=2, progress=False)
    for key, whole in latency.whole.items():
        predicted = latency.of({name: key for name, row in table.entries.items() if key in row})
        assert predicted == pytest.approx(whole)
    mixture = table.allocate(max_bytes=12_000).choices
    assert min(latency.whole.values()) / 2 < latency.of(mixture) < 2 * max(latency.whole.values())
    recipe = table.allocate(max_latency=f"{1e6 * max(latency.whole.values()):.3f}us")
    assert recipe.latency is not None
    assert recipe.latency <= max(latency.whole.values())
    assert table.pareto("latency").cost == "latency"


def test_cache_makes_a_second_search_free(model: TiedModel, data: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first = hb.measure_sensitivity(model, data, SCHEMES, cache=path, progress=False)
    with path.open("a") as file:
        file.write('{"key": "cut sho')  # as an interrupt leaves it
    lines = path.read_text().count("\n")
    second = hb.measure_sensitivity(model, data, SCHEMES, cache=path, progress=False)
    assert path.read_text().count("\n") == lines
    assert second.entries == first.entries
    with torch.no_grad():
        model.up_proj.weight.add_(0.01)
    third = hb.measure_sensitivity(model, data, SCHEMES, cache=path, progress=False)
    assert third.entries != first.entries
    path.write_text("something else\n")
    with pytest.raises(hb.FileFormatError, match=r"is not a cache of sensitivities"):
        hb.measure_sensitivity(model, data, SCHEMES, cache=path, progress=False)


def test_cache_tells_losses_apart(model: TiedModel, data: list[Tensor], tmp_path: Path) -> None:
    def size(module: nn.Module, batch: Tensor, power: float) -> float:
        return float(module(batch).abs().pow(power).mean())

    losses = [lambda m, b: size(m, b, 1.0), lambda m, b: size(m, b, 2.0), functools.partial(size, power=3.0)]
    found = [
        hb.measure_sensitivity(model, data, SCHEMES, loss=loss, cache=tmp_path / "cache.jsonl", progress=False)
        for loss in losses
    ]
    assert len({str(table.uniform_losses) for table in found}) == 3


def test_interrupted_search_goes_on_from_its_cache(model: TiedModel, data: list[Tensor], tmp_path: Path) -> None:
    left = 12

    def forward(module: nn.Module, batch: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return module(batch)

    path = tmp_path / "cache.jsonl"
    with pytest.raises(KeyboardInterrupt):
        hb.measure_sensitivity(model, data[:1], SCHEMES, cache=path, forward=forward, progress=False)
    done = path.read_text().count("\n") - 1
    assert 5 < done < 12
    left = -1
    hb.measure_sensitivity(model, data[:1], SCHEMES, cache=path, forward=forward, progress=False)
    without = -left
    left = -1
    hb.measure_sensitivity(model, data[:1], SCHEMES, forward=forward, progress=False)
    assert -left - without == done


def test_saved_tables_allocate_without_the_model(table: hb.SensitivityTable, tmp_path: Path) -> None:
    table.measure_latency(seconds=0.5, progress=False)
    table.save(tmp_path / "table.json")
    loaded = hb.SensitivityTable.load(tmp_path / "table.json")
    assert loaded.to_dict() == table.to_dict()
    recipe = loaded.allocate(max_bytes=12_000, max_latency=1.0)
    assert recipe.measured_loss is None
    assert recipe.choices == table.allocate(max_bytes=12_000, max_latency=1.0, corrections=0).choices
    with pytest.raises(hb.QuantizationError, match=r"no model to time the model"):
        loaded.measure_latency()
    with pytest.raises(hb.QuantizationError, match=r"pin Linear is a module type, and this table has no model"):
        loaded.allocate(max_bytes=12_000, pins={nn.Linear: SCHEMES[0]})
    fields = table.to_dict()
    entries = {name: row for name, row in fields["entries"].items() if name != "lstm"}  # type: ignore[attr-defined]
    with pytest.raises(hb.FileFormatError, match=r"its entries are not those of its units"):
        hb.SensitivityTable.from_dict({**fields, "entries": entries})
    (tmp_path / "table.json").write_text('{"format": "halfbyte sensitivity table 1"}')
    with pytest.raises(hb.FileFormatError, match=r"damaged"):
        hb.SensitivityTable.load(tmp_path / "table.json")
    (tmp_path / "table.json").write_text("<html>")
    with pytest.raises(hb.FileFormatError, match=r"is not JSON"):
        hb.SensitivityTable.load(tmp_path / "table.json")


def test_bad_requests(model: TiedModel, data: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"one scheme leaves nothing to choose"):
        hb.measure_sensitivity(model, data, [SCHEMES[0], SCHEMES[0]], progress=False)
    with pytest.raises(TypeError, match=r"is not a list"):
        hb.measure_sensitivity(model, data, SCHEMES[0], progress=False)  # type: ignore[arg-type]
    with pytest.raises(hb.QuantizationError, match=r"no batches"):
        hb.measure_sensitivity(model, [], SCHEMES, progress=False)
    with pytest.raises(hb.QuantizationError, match=r"loss gave nan for batch 0"):
        hb.measure_sensitivity(model, data, SCHEMES, loss=lambda m, b: math.nan, progress=False)
    with pytest.raises(hb.QuantizationError, match=r"tensor with a gradient"):
        with_gradient = torch.ones((), requires_grad=True)
        hb.measure_sensitivity(model, data, SCHEMES, loss=lambda m, b: with_gradient, progress=False)
    with pytest.raises(ValueError, match=r"loss='accuracy' is unknown"):
        hb.measure_sensitivity(model, data, SCHEMES, loss="accuracy", progress=False)  # type: ignore[arg-type]


def test_too_few_data_are_said_to_be(model: TiedModel) -> None:
    near = [hb.int_weight_only(8, group_size=32), hb.int_weight_only(7, group_size=32)]
    with pytest.warns(SensitivityWarning, match=r"too few to tell the schemes apart"):
        table = hb.measure_sensitivity(model, [torch.tensor([[1, 2]])], near, progress=False)
    assert table.warnings


def test_other_losses_and_schemes(model: TiedModel, data: list[Tensor]) -> None:
    schemes = [hb.int8_dynamic(), hb.int4_int8_dynamic(32), hb.bf16()]
    table = hb.measure_sensitivity(model, data, schemes, loss="mse", around="float", progress=False)
    assert {"float", *map(str, schemes)} == set(table.entries["lstm"])

    def error_rate(module: nn.Module, batch: Tensor) -> float:
        return float((module(batch).argmax(-1) != batch).float().mean())

    with warnings.catch_warnings():  # four batches are few for an error rate
        warnings.simplefilter("ignore", SensitivityWarning)
        called = hb.measure_sensitivity(model, data, schemes, loss=error_rate, around="quantized", progress=False)
    assert called.loss_name == "error_rate"
    assert called.allocate(max_bytes="30kB").bytes <= 30_000


def _softmax_regression() -> tuple[nn.Module, Workbench, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 5, bias=False))
    bench = Workbench(model, find_units(model, SCHEMES[0]))
    for scheme in SCHEMES:
        bench.add_scheme(str(scheme), scheme)
    return model, bench, torch.randn(64, 32)


def test_trace_is_that_of_the_hessian() -> None:
    model, bench, x = _softmax_regression()
    p = model(x).softmax(-1).detach()
    trace = float(((p * (1 - p)).sum(-1) * x.square().sum(-1)).mean())
    scores = proxy_scores(bench, [x], "trace", samples=400, progress=False)["0"]
    for scheme in SCHEMES:
        error = bench.candidates["0"][str(scheme)].modules["0"].weight - model[0].weight.detach()
        assert scores[str(scheme)] == pytest.approx(trace / error.numel() * float(error.square().sum()), rel=0.1)


def test_fisher_is_the_second_order_of_the_divergence() -> None:
    model, bench, x = _softmax_regression()
    scores = proxy_scores(bench, list(x.split(1)), "fisher", samples=64, progress=False)["0"]
    for scheme in SCHEMES[1:]:
        error = bench.candidates["0"][str(scheme)].modules["0"].weight - model[0].weight
        p, change = model(x).softmax(-1), x @ error.T
        exact = 0.5 * float(((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean())
        assert scores[str(scheme)] == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("method", ["fisher", "trace", "output_error"])
def test_proxies_order_widths(data: list[Tensor], method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 40))
    table = hb.measure_sensitivity(model, data, SCHEMES, method=method, progress=False)  # type: ignore[arg-type]
    for row in table.entries.values():
        losses = [row[str(scheme)].loss for scheme in SCHEMES]
        assert losses == sorted(losses)
    budget = table.bytes_of(dict.fromkeys(table.entries, str(SCHEMES[1])))
    assert table.allocate(max_bytes=budget).loss <= table.uniform_losses[str(SCHEMES[1])]


def test_corrections_start_from_the_better_of_two_opinions(data: list[Tensor]) -> None:
    plain = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 40))
    table = hb.measure_sensitivity(plain, data, SCHEMES, progress=False)
    assert table.session is not None
    traces = table.session.traces()
    assert traces is not None
    assert traces.keys() == table.entries.keys()
    budget = table.bytes_of(dict.fromkeys(table.entries, str(SCHEMES[1])))
    traced = hb.measure_sensitivity(plain, data, SCHEMES, method="trace", progress=False)
    assert table.allocate(max_bytes=budget).loss <= traced.allocate(max_bytes=budget, corrections=0).loss
    with_loss = hb.measure_sensitivity(plain, data, SCHEMES, loss="mse", progress=False)
    assert with_loss.session is not None
    assert with_loss.session.traces() is None  # traces are of the cross-entropy
