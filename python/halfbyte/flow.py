"""What flows between the repeated blocks of a model, captured once, so that each block can be run by itself.

Kept for every batch are the hidden states that enter the block at work, and the other arguments of every block (masks,
position embeddings). Tensors wait in a `TensorStore`: in memory up to a budget, past it in a file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from halfbyte.errors import QuantizationError
from halfbyte.progress import track
from halfbyte.staging import TensorStore
from halfbyte.table import format_bytes
from halfbyte.targets import is_target

Arguments: TypeAlias = tuple[tuple[object, ...], dict[str, object]]
Run: TypeAlias = Callable[[nn.Module, object], object]


class Blocks(Protocol):
    """Where blocks come from: a model in memory, or files."""

    def original(self, name: str) -> nn.Module:
        """The float block; it is only read."""
        ...

    def copy(self, name: str) -> nn.Module:
        """The same to be changed."""
        ...

    def enter(self, name: str) -> None:
        """The model itself is about to run the block."""
        ...

    def leave(self, name: str) -> None:
        """It has."""
        ...


@dataclass(frozen=True, slots=True)
class BlocksInMemory:
    """Blocks of a model that has its weights."""

    model: nn.Module

    def original(self, name: str) -> nn.Module:
        """The model's own."""
        return self.model.get_submodule(name)

    def copy(self, name: str) -> nn.Module:
        """A deep copy."""
        return copy.deepcopy(self.model.get_submodule(name))

    def enter(self, name: str) -> None:
        """Nothing to do."""

    def leave(self, name: str) -> None:
        """Nothing to do."""


def find_blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the repeated blocks: the children, all of one type, of the list that holds most of the named layers."""
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        children = list(module)
        if len({type(child) for child in children}) > 1 or is_target(children[0]):
            continue
        prefix = name + "." if name else ""
        inside = sum(n.startswith(prefix) for n in names)
        if inside > best[0]:
            best = (inside, [prefix + child for child, _ in module.named_children()])
    return best[1]


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def section_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of the largest copy that `round_in_order` makes: a block, or the model if it has none."""
    return max(map(module_bytes, [model.get_submodule(block) for block in find_blocks(model, names)] or [model]))


@dataclass(frozen=True, slots=True)
class _Stored:
    """Stands for a tensor in the store."""

    key: str


@dataclass(slots=True)
class Flow:
    """What enters the block at work, by batch.

    Attributes:
        store: Has the tensors.
        float_too: Whether the float model's hidden states flow along.
        template: What a block returns: a tensor, or a tuple whose first element is the hidden states.
        others: By batch and block, the arguments after the first.
    """

    store: TensorStore
    float_too: bool
    template: object
    others: list[list[Arguments]] = field(default_factory=list)

    def add(self, hidden: Tensor, others: Sequence[Arguments]) -> None:
        """The next batch."""
        batch = len(self.others)
        self.put(batch, hidden, hidden if self.float_too else None)
        keys: dict[int, tuple[str, Tensor]] = {}  # tensors stay alive meanwhile: no other gets the id of one
        for tensor in _tensors(list(others)):
            if id(tensor) not in keys:
                keys[id(tensor)] = (f"{batch} argument {len(keys)}", tensor)
                self.store.put(keys[id(tensor)][0], tensor)
        memo: dict[int, object] = {key: _Stored(name) for key, (name, _) in keys.items()}
        self.others.append([copy.deepcopy(arguments, dict(memo)) for arguments in others])

    def put(self, batch: int, hidden: Tensor, float_hidden: Tensor | None) -> None:
        """Sets the hidden states of a batch."""
        self.store.put(f"{batch} hidden", hidden)
        if float_hidden is not None:
            self.store.put(f"{batch} float", float_hidden)

    def hidden(self, batch: int, *, reference: bool = False) -> Tensor:
        """What the quantized blocks before the one at work return, or (`reference`) the float ones."""
        return self.store.get(f"{batch} {'float' if reference else 'hidden'}")

    def run(self, index: int, block: nn.Module, batch: int, reference: bool) -> object:
        """Calls block `index` on the hidden states and its other arguments."""
        args, kwargs = self._arguments(batch, index)
        return block(self.hidden(batch, reference=reference).clone(), *args, **kwargs)  # it may add to it in place

    def _arguments(self, batch: int, index: int) -> Arguments:
        """Copies that share the tensors: blocks may change other arguments, such as caches, and each run gets its own."""
        stored = self.others[batch][index]
        memo: dict[int, object] = {id(ref): self.store.get(ref.key) for ref in _leaves(stored, _Stored)}
        return copy.deepcopy(stored, memo)

    def output(self, hidden: Tensor) -> object:
        """What a block returns, with these hidden states."""
        return (hidden, *self.template[1:]) if isinstance(self.template, tuple) else hidden

    def hand_on(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        """Forward of a block that returns what it gets."""
        return self.output(hidden.clone())


def hidden_of(output: object) -> Tensor:
    """The hidden states that a block returned."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def capture(
    model: nn.Module,
    names: Sequence[str],
    blocks: Blocks,
    batches: Sequence[object],
    run: Run,
    store: TensorStore,
    *,
    drift: bool,
    progress: bool,
    room: int | None = None,
) -> Flow | None:
    """The flow into the first block of `names`; None unless the blocks simply feed one another.

    The whole model runs on the first batch. For the others, each block hands on what it gets: that is enough to see their
    arguments, if those of the first batch come out as they did when the model ran.

    Args:
        model: In evaluation mode, without gradients.
        names: Qualified names of the blocks, in order.
        blocks: Gives them their weights.
        batches: Calibration data.
        run: Runs the model on a batch.
        store: Where tensors wait.
        drift: Let the float model's hidden states flow along.
        progress: Show a progress bar on stderr.
        room: Bytes that running a block may take, None for no limit.

    Raises:
        QuantizationError: running a block on the first batch takes more than `room`.
    """
    first = _run_blocks(model, names, blocks, lambda: run(model, batches[0]))
    if first is None:
        return None
    taken = first.activations + 3 * first.hidden.nbytes  # the block's input, and copies of those of a layer
    if room is not None and taken > room:
        raise QuantizationError(
            f"max_memory is too little: running a block on the first batch takes {format_bytes(taken)}, and "
            f"{format_bytes(room)} are left for it; give {format_bytes(2 * (taken - room))} more, or smaller batches"
        )
    flow = Flow(store, drift, first.template)
    with ExitStack() as stack:
        stack.callback(_hand_on(model, names, flow))
        for index, batch in enumerate(track(batches, "calibrating", enabled=progress)):
            seen = _run_blocks(model, names, None, lambda: run(model, batch))  # noqa: B023, called at once
            if seen is None or (index == 0 and not _same(seen.others, first.others)):
                return None
            flow.add(seen.hidden, seen.others)
    return flow


@dataclass(slots=True)
class _Seen:
    """One run of the blocks."""

    hidden: Tensor
    others: list[Arguments]
    template: object
    activations: int
    """Bytes of all that the modules of the first block return."""


class BlocksDone(Exception):
    """Ends a run whose rest is not needed."""


def _run_blocks(
    model: nn.Module, names: Sequence[str], blocks: Blocks | None, run: Callable[[], object]
) -> _Seen | None:
    """Runs the model once; None unless each block gets what the one before it returned, and each runs once."""
    seen = _Seen(torch.empty(0), [], None, 0)
    modules = [model.get_submodule(name) for name in names]
    order = {id(module): index for index, module in enumerate(modules)}
    previous: object = None
    chained = True

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal chained
        index, hidden = order[id(module)], args[0] if args else None
        if index != len(seen.others) or not isinstance(hidden, Tensor):
            chained = False
        elif index == 0:
            seen.hidden = hidden.clone()  # a block may add to it in place
        else:
            chained = hidden is (previous[0] if isinstance(previous, tuple) and previous else previous)
        if not chained:
            raise BlocksDone
        seen.others.append((args[1:], kwargs) if blocks is None else _fresh((args[1:], kwargs)))
        if blocks is not None:
            blocks.enter(names[index])

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        nonlocal previous
        previous = output
        if order[id(module)] == 0:
            seen.template = output
        if blocks is not None:
            blocks.leave(names[order[id(module)]])

    def size(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        seen.activations += sum(tensor.nbytes for tensor in _tensors(output))

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        for module in modules[0].modules():
            hooks.callback(module.register_forward_hook(size).remove)
        try:
            run()
        except BlocksDone:
            if not chained:
                return None
    return seen if len(seen.others) == len(names) else None


def _hand_on(model: nn.Module, names: Sequence[str], flow: Flow) -> Callable[[], None]:
    """Lets every block return what it gets, and the last one end the run; what it returns undoes that."""

    def end(hidden: Tensor, *args: object, **kwargs: object) -> object:
        raise BlocksDone

    return replace_forward(model, dict.fromkeys(names[:-1], flow.hand_on) | {names[-1]: end})


def replace_forward(model: nn.Module, forwards: Mapping[str, Callable[..., object]]) -> Callable[[], None]:
    """Gives modules another forward; what it returns undoes that."""
    modules = {name: model.get_submodule(name) for name in forwards}
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, forward in forwards.items():
        modules[name].__dict__["forward"] = forward

    def undo() -> None:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]

    return undo


def _fresh(arguments: Arguments) -> Arguments:
    """A copy that shares the tensors."""
    return copy.deepcopy(arguments, {id(tensor): tensor for tensor in _tensors(arguments)})


def _tensors(value: object) -> Iterator[Tensor]:
    return _leaves(value, Tensor)


def _leaves(value: object, kind: type) -> Iterator:  # type: ignore[type-arg]
    """The objects of a type in nested tuples, lists and mappings."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item, kind)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item, kind)


def _same(first: Sequence[Arguments], second: Sequence[Arguments]) -> bool:
    """Whether two lists of arguments hold equal tensors."""
    tensors = list(_tensors(list(first))), list(_tensors(list(second)))
    return len(tensors[0]) == len(tensors[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )
