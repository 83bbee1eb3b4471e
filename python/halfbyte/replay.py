"""Runs the same batches through a block again and again, and computes again only what can have changed.

A block is run once for every layer of it that is rounded. What comes before that layer and is rounded already gives what it
gave the last time: its outputs are kept and handed out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from halfbyte.flow import replace_forward

Output = Tensor | tuple[Tensor | None, ...]


class Replay:
    """The outputs of a block's submodules that will not change any more, by batch.

    A submodule is *settled* once all layers that run before its own last one are, and that one too: then neither its weights
    nor its inputs change. What an outer one gives takes the place of what those inside it gave. A submodule that runs several
    times in a batch, or gives something else than tensors, is computed as ever, and so is all that no room is left for.

    Args:
        module: The block. Its modules' forwards are replaced while it runs, and only then.
        order: Names of its layers that will change, in the order in which they run.
        room: Bytes for outputs.
    """

    def __init__(self, module: nn.Module, order: Sequence[str], room: int) -> None:
        self._module, self._order, self._room = module, list(order), room
        self._settled: set[str] = set()
        self._modules: list[str] = []
        self._unfit: set[str] = set()
        self._kept: dict[tuple[str, int], Output] = {}

    def settle(self, names: Sequence[str]) -> None:
        """These layers have got their final weights."""
        self._settled.update(names)
        done = next((i for i, name in enumerate(self._order) if name not in self._settled), len(self._order))
        last = {name: 0 for name, _ in self._module.named_modules() if name}
        for index, name in enumerate(self._order):
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                last[".".join(parts[:length])] = index + 1
        self._modules = [name for name, index in last.items() if 0 < index <= done and name not in self._unfit]

    @contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """While the block runs on a batch, by number."""
        ran: set[str] = set()
        undo = replace_forward(self._module, {name: self._forward(name, batch, ran) for name in self._modules})
        try:
            yield
        finally:
            undo()

    def _forward(self, name: str, batch: int, ran: set[str]) -> Callable[..., object]:
        compute = self._module.get_submodule(name).forward

        def forward(*args: object, **kwargs: object) -> object:
            again = name in ran
            ran.add(name)
            if again:
                self._unfit.add(name)
            kept = self._kept.get((name, batch))
            if kept is not None and not again:
                return _copy(kept)
            output = compute(*args, **kwargs)
            if name not in self._unfit:
                self._keep(name, batch, output)
            return output

        return forward

    def _keep(self, name: str, batch: int, output: object) -> None:
        parts = output if type(output) is tuple else (output,)
        if not all(part is None or type(part) is Tensor for part in parts):
            self._unfit.add(name)
            return
        for key in [key for key in self._kept if key[1] == batch and _inside(key[0], name)]:
            self._room += _bytes(self._kept.pop(key))
        size = _bytes(output)  # type: ignore[arg-type]
        if size <= self._room:
            self._room -= size
            self._kept[name, batch] = _copy(output)  # type: ignore[arg-type]


def _inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _copy(output: Output) -> Output:
    """Which the block may change in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(None if part is None else part.clone() for part in output)


def _bytes(output: Output) -> int:
    parts = (output,) if isinstance(output, Tensor) else output
    return sum(0 if part is None else part.nbytes for part in parts)
