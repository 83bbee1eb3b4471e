"""Rotation: the residual stream is turned by an orthogonal matrix, which spreads outlying channels over all of them.

Ashkboos et al. 2024 (arXiv:2404.00456, QuaRot), the rotation R1 that is folded into weights alone: RMSNorm with equal gains
commutes with it, so whatever writes to the stream is turned, whatever reads it turned back, and nothing is left to do at run
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfbyte.algorithms.transform import TransformContext, TransformRecord
from halfbyte.errors import QuantizationError
from halfbyte.folds import Fold
from halfbyte.plan import Plan
from halfbyte.probing import linear_layers, replaced_forward
from halfbyte.table import format_bytes

_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Transform that rotates the residual stream of a model whose norms are all RMSNorm, or nothing.

    Norms that read the stream are found by running the model, as are the embeddings and linear layers that write to it. Gains
    are folded into the layers that read the norms, then both sides are turned: by a Hadamard matrix with random signs where
    the width is a power of two, else by a random orthogonal matrix. The result is shown to compute what the float model did,
    or taken back.

    Args:
        seed: Of the signs, or of the matrix.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        ...
        ...     def forward(self, x):
        ...         return x + self.down(self.up(self.norm(x)).relu())
        >>> model = nn.Sequential(nn.Embedding(50, 32), Residual(), nn.RMSNorm(32), nn.Linear(32, 50))
        >>> batches = [torch.randint(0, 50, (4, 16)) for _ in range(2)]
        >>> rotation = hb.algorithms.Rotation()
        >>> report = hb.quantize_(model, hb.int8_dynamic(), data=batches, algorithms=[rotation], progress=False)
        >>> report.transforms[0].consumers
        ('1.up', '3')
    """

    seed: int = 0

    @property
    def needs_data(self) -> bool:
        """One batch, as the example."""
        return True

    def check(self, plan: Plan) -> None:
        """Raises where a table and a head share a weight: turned, they no longer would."""
        for row in plan.targets:
            if row.tied_to is not None and row.shape is not None:
                size = format_bytes(row.shape[0] * row.shape[1] * 4)
                raise QuantizationError(
                    f"Rotation: {row.name} shares its weight with {row.tied_to}; the gains of the last norm go into only "
                    f"one of them. Give it its own, {size} more in float32: m = model.get_submodule({row.name!r}); "
                    "m.weight = nn.Parameter(m.weight.detach().clone())"
                )

    def calibration_bytes(self, plan: Plan) -> int:
        """The matrix, and three copies of the largest weight."""
        shapes = [row.shape for row in plan.targets if row.shape is not None]
        return 8 * max(min(shape) for shape in shapes) ** 2 + 12 * max(shape[0] * shape[1] for shape in shapes)

    def transform(self, context: TransformContext) -> list[TransformRecord]:
        """Rotates the stream, or says why not."""
        stream = _Stream.of(context)
        if isinstance(stream, str):
            return [TransformRecord(transform="Rotation", producer="model", reason=stream, failed=True)]
        matrix = orthogonal(stream.width, self.seed)
        change, reason = context.example.prove(stream.rotate(context, matrix))
        consumers = tuple(consumer.name for fold in stream.readers for consumer in fold.consumers)
        kind = "Hadamard" if stream.width & (stream.width - 1) == 0 else "random orthogonal"
        detail = f"{kind}, width {stream.width}; written by {', '.join(stream.writers)}"
        return [
            TransformRecord(
                transform="Rotation",
                producer="model",
                consumers=consumers,
                detail=detail,
                change=change,
                reason=reason,
                failed=bool(reason),
            )
        ]


def orthogonal(width: int, seed: int) -> Tensor:
    """`[width, width]` float64: Hadamard with random signs for a power of two, else the Q of a random matrix.

    Example:
        >>> matrix = orthogonal(8, 0)
        >>> torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    if width & (width - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < width:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
        return torch.mul(matrix, signs[:, None]).div_(width**0.5)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return torch.mul(q, r.diagonal().sign())


@dataclass(frozen=True, slots=True)
class _Stream:
    """What reads a residual stream, as folds of norms, and the names of what writes to it."""

    width: int
    readers: list[Fold]
    writers: list[str]

    @staticmethod
    def of(context: TransformContext) -> _Stream | str:
        """Finds the stream; says why if there is none that can be rotated."""
        model = context.model
        folds, failed = context.folds()
        readers = [fold for fold in folds if not isinstance(model.get_submodule(fold.producer), nn.Linear)]
        if not readers:
            reason = next((f"; {n.producer}: {n.reason}" for n in failed if not _is_linear(model, n.producer)), "")
            return f"no norm is read by linear layers alone{reason}"
        widths = [fold.channels for fold in readers]
        width = max(set(widths), key=widths.count)
        readers = [fold for fold in readers if fold.channels == width]
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                return f"{name} is {parameter.dtype}, in which turned weights would be rounded: use model.float() first"
        for fold in readers:
            if len(fold.offsets) != 1:
                return f"{fold.producer} has a bias, so it is no RMSNorm"
        replay = _Replay(context, [fold.producer for fold in readers])
        other = replay.not_commuting({fold.producer: fold.offsets for fold in readers}, orthogonal(width, 1).float())
        if other is not None:
            return f"{other} does not commute with a rotation, so it is no RMSNorm (LayerNorm takes the mean off)"
        writers = [name for name in _candidates(model, width) if replay.writes(name, width)]
        return _Stream(width, readers, writers) if writers else "nothing was found that writes to it"

    def rotate(self, context: TransformContext, matrix: Tensor) -> Callable[[], None]:
        """Folds the gains, turns both sides; gives what undoes it."""
        model, edits = context.model, context.edits
        written: list[tuple[nn.Parameter, Tensor]] = []

        def write(parameter: nn.Parameter | None, value: Tensor) -> None:
            assert parameter is not None
            written.append((parameter, parameter.detach().clone()))
            edits.write(parameter, value)

        for fold in self.readers:
            ((name, offset),) = fold.offsets.items()
            gain = model.get_submodule(fold.producer)._parameters[name]
            assert gain is not None
            size = gain.detach().double() + offset
            for consumer in fold.consumers:
                weight = model.get_submodule(consumer.name)._parameters["weight"]
                assert weight is not None
                to_channels = torch.zeros(len(consumer.channel_of), self.width, dtype=torch.float64)
                to_channels[torch.arange(len(consumer.channel_of)), consumer.channel_of] = size[consumer.channel_of]
                write(weight, weight.detach().double() @ to_channels @ matrix)
            write(gain, torch.full_like(gain, 1.0 - offset))
        for name in self.writers:
            module = model.get_submodule(name)
            weight, bias = module._parameters["weight"], module._parameters.get("bias")
            assert weight is not None
            turned = weight.detach().double()
            write(weight, matrix.t() @ turned if isinstance(module, nn.Linear) else turned @ matrix)
            if bias is not None:
                write(bias, bias.detach().double() @ matrix)

        def undo() -> None:
            for parameter, value in reversed(written):
                edits.write(parameter, value)

        return undo


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _candidates(model: nn.Module, width: int) -> list[str]:
    """Linear layers and tables that give as many channels as the stream has."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == width)
        or (isinstance(module, nn.Embedding) and module.embedding_dim == width)
    ]


@dataclass(slots=True)
class _Replay:
    """The example with linear layers that repeat what they gave: what is added to the stream once stays in it as it is.

    Attributes:
        inputs: By norm, what it got.
        outputs: By linear layer, what it gave, call by call.
    """

    context: TransformContext
    norms: Sequence[str]
    inputs: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def record(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            output = type(module).forward(module, x)
            self.outputs.setdefault(name, []).append(output.clone())
            return output

        self._run(record, lambda name, args: self.inputs.setdefault(name, (args[0].clone(), *args[1:])))

    def _run(
        self,
        forward: Callable[[str, nn.Linear, Tensor], Tensor],
        look: Callable[[str, tuple[Tensor, ...]], object],
    ) -> None:
        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: (look(name, args), None)[1]

        model = self.context.model
        with ExitStack() as stack:
            for name in self.norms:
                stack.callback(model.get_submodule(name).register_forward_pre_hook(watch(name)).remove)
            stack.enter_context(replaced_forward(linear_layers(model), forward))
            self.context.example.run()

    def writes(self, writer: str, width: int) -> bool:
        """Whether what is added to the output of a module arrives, as it is, at norms of the stream."""
        nudge = torch.linspace(-1.0, 1.0, width)
        calls: dict[str, int] = {}
        arrived: list[bool] = []

        def replay(name: str, module: nn.Linear, x: Tensor) -> Tensor:
            calls[name] = calls.get(name, -1) + 1
            return self.outputs[name][calls[name]].clone()

        def compare(name: str, args: tuple[Tensor, ...]) -> None:
            before = self.inputs[name][0]
            difference = args[0] - before
            if bool(difference.any()):
                arrived.append(bool((difference - nudge).abs().max() <= _TOLERANCE * (1 + before.abs().max())))

        module = self.context.model.get_submodule(writer)
        handle = module.register_forward_hook(lambda module, args, output: output + nudge)
        try:
            self._run(replay, compare)
        finally:
            handle.remove()
        return bool(arrived) and all(arrived)

    def not_commuting(self, gains: dict[str, dict[str, float]], matrix: Tensor) -> str | None:
        """The first norm that, with gains of 1, does not commute with a rotation."""
        for name, (x, *others) in self.inputs.items():
            module = self.context.model.get_submodule(name)
            plain = {parameter: torch.full((x.shape[-1],), 1.0 - offset) for parameter, offset in gains[name].items()}
            one = torch.func.functional_call(module, plain, (x @ matrix, *others))
            other = torch.func.functional_call(module, plain, (x, *others)) @ matrix
            if (one - other).abs().max() > _TOLERANCE * other.abs().max():
                return name
        return None
