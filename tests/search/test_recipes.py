"""What a search chose, through every way of quantizing: weights only, dynamic, static and trained; CNN and language model."""

import copy

import pytest
import torch
from test_sensitivity import TiedModel
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = {
    "weights": [hb.int_weight_only(bits, group_size=32) for bits in (8, 4)],
    "dynamic": [hb.int8_dynamic(), hb.int4_int8_dynamic(32)],
    "static": [hb.int8_static(), hb.int_weight_only(4)],
}


def cnn() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip
    return model.eval(), [torch.randn(16, 3, 8, 8) for _ in range(3)]


def language_model() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return TiedModel().eval(), [torch.randint(0, 40, (8, 32)) for _ in range(3)]


def chosen(model: nn.Module, data: list[Tensor], schemes: list[hb.Scheme]) -> hb.Allocation:
    """A mixture of both schemes."""
    table = hb.measure_sensitivity(model, data, schemes, progress=False)
    sizes = [table.bytes_of(dict.fromkeys(table.entries, str(scheme))) for scheme in schemes]
    recipe = table.allocate(max_bytes=sum(sizes) // 2, pins=dict.fromkeys(list(table.entries)[:1], schemes[0]))
    assert set(recipe.choices.values()) >= {str(schemes[0]), str(schemes[1])}
    return recipe


@pytest.mark.parametrize("make", [cnn, language_model])
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_quantizing_gives_the_loss_and_the_bytes_that_were_measured(make: object, kind: str) -> None:
    model, data = make()  # type: ignore[operator]
    recipe = chosen(model, data, SCHEMES[kind])
    original = copy.deepcopy(model)
    # Given data, roundings weigh errors by it; the search gave it to them only where a scheme needs it.
    given = data if kind == "static" else None
    report = hb.quantize_(model, recipe, data=given, algorithms=[hb.MSE()], progress=False, on_fallback="allow")
    assert report.bytes_after == recipe.bytes
    assert hb.compare(original, model, data, kind="logits").outputs[0].kl == pytest.approx(
        recipe.measured_loss, rel=0.01
    )


@pytest.mark.parametrize("make", [cnn, language_model])
@pytest.mark.parametrize("kind", list(SCHEMES))
def test_training_takes_a_recipe_and_keeps_its_bytes(make: object, kind: str) -> None:
    model, data = make()  # type: ignore[operator]
    recipe = chosen(model, data, SCHEMES[kind])
    hb.prepare_qat_(model.train(), recipe, on_fallback="allow")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = model.eval()(data[0])
    report = hb.convert_(model)
    assert report.bytes_after == recipe.bytes
    assert [row.plan.scheme.weight.bits for row in report.modules if row.name in recipe.overrides] == [
        recipe.overrides[row.name].weight.bits for row in report.modules if row.name in recipe.overrides
    ]
    with torch.no_grad():
        assert torch.equal(model(data[0]), trained)
