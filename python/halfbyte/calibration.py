"""Running calibration data through a model, and what is measured while it runs.

`data` is any iterable of batches: a tensor (the one argument), a tuple or list (positional arguments), or a mapping (keyword
arguments). `forward(model, batch)` runs batches of any other kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfbyte.convolution import ConvGeometry, ConvModule
from halfbyte.errors import QuantizationError
from halfbyte.progress import track

Data: TypeAlias = Iterable[object]
Forward: TypeAlias = Callable[[nn.Module, object], object]

_NO_BATCHES = "data gave no batches; if it is a generator, it was used up before: make a new one"


def run_batch(model: nn.Module, batch: object) -> object:
    """Calls the model with one batch.

    Raises:
        TypeError: the batch is none of the kinds above.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}; give a tensor, a tuple of positional arguments, a dict of keyword arguments, "
        "or forward=lambda model, batch: ..."
    )


def check_data(data: object) -> Data:
    """Raises unless `data` can be iterated over and is not a single batch by mistake."""
    if isinstance(data, Tensor):
        raise TypeError("data is one tensor; give an iterable of batches, such as [tensor] or tensor.split(8)")
    if isinstance(data, Mapping):
        raise TypeError("data is one mapping; give an iterable of batches, such as [mapping]")
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(f"data is a {type(data).__name__}; give an iterable of batches")
    if isinstance(data, Sized) and len(data) == 0:
        raise QuantizationError("data has no batches; give at least one")
    return data


def all_batches(data: object) -> list[object]:
    """The batches as a list, for work that goes through them more than once.

    Raises:
        QuantizationError: there are none.
    """
    batches = list(check_data(data))
    if not batches:
        raise QuantizationError(_NO_BATCHES)
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flags come back as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run_data(
    model: nn.Module,
    data: Data,
    *,
    forward: Forward | None = None,
    progress: bool = True,
    enough: Callable[[int], bool] = lambda batches: False,
) -> int:
    """Runs batches in evaluation mode without gradients, all of them unless `enough` says after one that they are.

    Returns:
        The number of batches.

    Raises:
        QuantizationError: there was no batch, most often a generator that was used before; or what an observer found wrong
            with one, with its index.
    """
    run = run_batch if forward is None else forward
    total = len(data) if isinstance(data, Sized) else None
    count = 0
    with evaluating(model):
        for batch in track(data, "calibrating", total=total, enabled=progress):
            try:
                with without_padding(batch):
                    run(model, batch)
            except QuantizationError as error:
                raise QuantizationError(f"batch {count} of the data: {error}") from error
            count += 1
            if enough(count):
                break
    if count == 0:
        raise QuantizationError(_NO_BATCHES)
    return count


_tokens: ContextVar[Tensor | None] = ContextVar("tokens", default=None)


@contextmanager
def without_padding(batch: object) -> Iterator[None]:
    """While a batch runs: statistics of inputs `[batch, tokens, I]` or `[batch * tokens, I]` leave out padding.

    That is where its `attention_mask` `[batch, tokens]` is zero.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    before = _tokens.set(mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    try:
        yield
    finally:
        _tokens.reset(before)


def tokens_of(x: Tensor) -> Tensor:
    """Inputs `[..., I]` as one row a token; padding of the batch that runs is left out."""
    rows, mask = x.detach().reshape(-1, x.shape[-1]), _tokens.get()
    if mask is None or not (mask.shape == x.shape[:-1] or (x.dim() == 2 and mask.numel() == len(rows))):
        return rows
    return rows[mask.reshape(-1)]


class InputStatistics:
    """Mean square of each input feature of a module, over all tokens seen; registered as a forward pre-hook.

    Where a batch is a mapping with an `attention_mask` `[batch, tokens]`, padding does not count.

    Constant memory. Sums run in float64, so that millions of tokens do not drift.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sum_of_squares: Tensor | None = None
        self.tokens = 0
        self.batches = 0

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The hook: adds the first positional argument `[..., I]`."""
        if args and isinstance(args[0], Tensor):
            if isinstance(module, ConvModule):
                self.update_convolution(args[0], ConvGeometry.of(module))
            else:
                self.update(args[0])

    def update(self, x: Tensor) -> None:
        """Adds a batch `[..., I]`.

        Raises:
            QuantizationError: NaN or inf among the inputs; names the module.
        """
        rows = tokens_of(x)
        self._add(rows)
        self.tokens += rows.shape[0]
        self.batches += 1

    def update_convolution(self, x: Tensor, geometry: ConvGeometry) -> None:
        """Adds the inputs `[N, C, ...]` of a convolution: a row for each output pixel and group of channels.

        Raises:
            QuantizationError: as `update`.
        """
        x = x.detach()
        for sample in torch.split(x.unsqueeze(0) if x.dim() == geometry.dims + 1 else x, 1):
            rows = geometry.rows(sample)
            self._add_groups(rows)
            self.tokens += rows.shape[0] * rows.shape[1]
        self.batches += 1

    def _add_groups(self, rows: Tensor) -> None:
        """Adds `[groups, pixels, I]`."""
        self._add(rows.flatten(0, 1))

    def _add(self, rows: Tensor) -> None:
        squares = rows.float().square().sum(dim=0, dtype=torch.float64)
        if not torch.isfinite(squares).all():
            raise self._not_finite()
        self._sum_of_squares = squares if self._sum_of_squares is None else self._sum_of_squares + squares

    def begin_share(self) -> None:
        """Sets aside what was seen, until `end_share`."""
        self._aside = (self._sum_of_squares, self.tokens, self.batches)
        self._sum_of_squares, self.tokens, self.batches = None, 0, 0

    def abandon_share(self) -> None:
        """Forgets what was seen since `begin_share`."""
        self._sum_of_squares, self.tokens, self.batches = self._aside

    def end_share(self) -> None:
        """Adds what all processes of the default group have seen since to what was set aside."""
        shares: list[tuple[Tensor | None, int, int]] = [(None, 0, 0)] * dist.get_world_size()
        dist.all_gather_object(shares, (self._sum_of_squares, self.tokens, self.batches))
        self._sum_of_squares, self.tokens, self.batches = self._aside
        for squares, tokens, batches in shares:
            if squares is not None:
                before = self._sum_of_squares
                self._sum_of_squares = squares if before is None else before + squares
            self.tokens += tokens
            self.batches += batches

    @property
    def mean_square(self) -> Tensor:
        """`[I]` float32.

        Raises:
            QuantizationError: the module never ran.
        """
        if self._sum_of_squares is None or self.tokens == 0:
            raise self._never_ran()
        return (self._sum_of_squares / self.tokens).float()

    def _not_finite(self) -> QuantizationError:
        return QuantizationError(f"{self._name}: NaN or inf among its inputs")

    def _never_ran(self) -> QuantizationError:
        return QuantizationError(
            f"{self._name} never ran on the data: give data that reaches it, or leave it out with "
            f"hb.Recipe(..., overrides={{{self._name!r}: None}})"
        )
