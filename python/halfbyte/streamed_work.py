"""The work of `quantize_checkpoint`: blocks are filled when they run, finished ones wait in the journal."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from halfbyte.calibration import Forward
from halfbyte.conversion import JournalStaging, Rounded, commit, finished_steps, restore, round_layer, round_weight
from halfbyte.fallback import Fallback, announce
from halfbyte.formats import FloatFormat
from halfbyte.hessian import InputHessian
from halfbyte.io.checkpoint import Checkpoint
from halfbyte.io.journal import Journal
from halfbyte.io.tensors import Slot, tensor_slots
from halfbyte.nn.packed_weight import PackedWeight
from halfbyte.plan import Plan, PlanRow
from halfbyte.preparation import Preparation, check_weight
from halfbyte.processes import Processes
from halfbyte.progress import track
from halfbyte.schemes import Scheme
from halfbyte.section import Resources
from halfbyte.sequential import round_in_order
from halfbyte.staging import packed_weight
from halfbyte.targets import weight_matrix


@dataclass(slots=True)
class StreamedWork:
    """The model at work: blocks are filled when they run and emptied again; finished ones are in the journal."""

    model: nn.Module
    source: Checkpoint
    blocks: Sequence[str]
    preparation: Preparation
    journal: Journal
    processes: Processes | None
    results: dict[str, Rounded] = field(default_factory=dict)
    rows: dict[str, PlanRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {row.name: row for row in self.preparation.plan.rows}

    # What `round_in_order` asks for.

    def original(self, name: str) -> nn.Module:
        """A block with its float weights."""
        block = copy.deepcopy(self.model.get_submodule(name))
        self.fill({f"{name}.{slot_name}": slot for slot_name, slot in tensor_slots(block).items()})
        return block

    def copy(self, name: str) -> nn.Module:
        """The same: each call reads it anew."""
        return self.original(name)

    def enter(self, name: str) -> None:
        """Fills a block of the model itself."""
        self.fill({f"{name}.{n}": slot for n, slot in tensor_slots(self.model.get_submodule(name)).items()})

    def leave(self, name: str) -> None:
        """Empties it."""
        for slot_name, slot in tensor_slots(self.model.get_submodule(name)).items():
            if f"{name}.{slot_name}" in self.source:
                _set(slot, slot.tensor.to("meta"))

    def fill(self, slots: dict[str, Slot]) -> None:
        """Reads what the checkpoint has for these slots; what is tied stays tied."""
        read: dict[int, Tensor] = {}
        before = {name: slot.tensor for name, slot in slots.items()}  # alive, so that no other gets the id of one
        for name in sorted(slots, key=lambda name: name not in self.source):
            tensor = before[name]
            if id(tensor) not in read and name in self.source:
                _set(slots[name], self.source.read(name, tensor.dtype))
                read[id(tensor)] = slots[name].tensor
            elif id(tensor) in read:
                holder = slots[name].module._parameters if slots[name].is_parameter else slots[name].module._buffers
                holder[slots[name].name] = read[id(tensor)]  # type: ignore[assignment]

    def round(self, batches: list[object], forward: Forward | None, progress: bool) -> None:
        """Works through the blocks, and then through what lies outside of them."""
        finished = finished_steps(self.journal, self.processes)
        for step in range(finished):
            self._restore(step)
        if finished > len(self.blocks):
            return
        if batches:
            names = [name for name, found in self.preparation.statistics.items() if isinstance(found, InputHessian)]
            rounding = self.preparation.hessian_rounding
            round_in_order(
                self.model,
                names,
                batches,
                self._round_layer,
                forward=forward,
                drift=rounding is not None and rounding.needs_drift,
                progress=progress,
                resources=Resources(
                    blocks=self, memory=self.preparation.budget.run, journal=self.journal, processes=self.processes
                ),
                finished=finished,
                finish=self._finish_block,
            )
            self.preparation.batches += len(batches)
        else:
            for step in track(range(finished, len(self.blocks)), "quantizing blocks", enabled=progress):
                self._finish_block(step)
                self.journal.finish(step)
        inside = tuple(block + "." for block in self.blocks)
        self._round_rest(self.model, "", [row for name, row in self.rows.items() if not name.startswith(inside)])
        self.journal.finish(len(self.blocks))

    def _round_layer(self, name: str, layer: nn.Module, inputs: InputHessian) -> Tensor:
        self._check_row(name, layer)
        store = JournalStaging(_Nowhere(), self.journal)
        self.results[name], rounded = round_layer(
            self.rows[name], weight_matrix(layer), inputs, self.preparation, store, self.processes
        )
        self._note(name, store)
        return rounded

    def _finish_block(self, step: int) -> None:
        block = self.blocks[step]
        module = self.original(block)
        self._round_rest(module, block + ".", [row for name, row in self.rows.items() if name.startswith(block + ".")])
        slots = {f"{block}.{name}": slot for name, slot in tensor_slots(module).items()}
        packed = {f"{row.name}.weight" for row in self.rows.values() if _is_packed(row)}
        kept = {}
        for name, slot in slots.items():
            if name not in packed and name in self.source:
                row = self.rows.get(name.rpartition(".")[0])
                cast_to = (
                    row.scheme.weight if row is not None and row.scheme is not None and slot.name == "weight" else None
                )
                kept[name] = slot.tensor.to(cast_to.dtype) if isinstance(cast_to, FloatFormat) else slot.tensor
        self.journal.add(block, kept, {"float": True})

    def _round_rest(self, module: nn.Module, prefix: str, rows: Sequence[PlanRow]) -> None:
        """The layers that no Hessian was collected for."""
        for row in rows:
            if row.scheme is None or row.tied_to is not None or row.name in self.results:
                continue
            layer = module.get_submodule(row.name.removeprefix(prefix))
            self._check_row(row.name, layer)
            store = JournalStaging(_Nowhere(), self.journal)
            self.results[row.name] = round_weight(
                weight_matrix(layer), self.rows[row.name], replace(self.preparation, statistics={}), store
            )
            self._note(row.name, store)

    def _check_row(self, name: str, layer: nn.Module) -> None:
        row = self.rows[name]
        self.rows[name] = check_weight(layer, row)
        announce(set(self.rows[name].fallbacks) - set(row.fallbacks), self.preparation.on_fallback)

    def _note(self, name: str, store: JournalStaging) -> None:
        store.note(name, self.results[name])
        row = self.rows[name]
        assert row.scheme is not None
        added = [f.to_dict() for f in row.fallbacks]
        self.journal.add(
            name, {}, {"scheme": row.scheme.to_dict(), "bytes_after": row.bytes_after, "row_fallbacks": added}
        )

    def _restore(self, step: int) -> None:
        """What is known of the layers of a finished step."""
        records = {name: r for name, r in self.journal.records(step).items() if not r.get("float")}
        self.results.update(restore(self.journal, step, self.rows, None))
        for name, record in records.items():
            self.rows[name] = replace(
                self.rows[name],
                scheme=Scheme.from_dict(cast("dict[str, object]", record["scheme"])),
                bytes_after=cast("int", record["bytes_after"]),
                fallbacks=tuple(Fallback(**f) for f in cast("list[dict[str, str]]", record["row_fallbacks"])),  # type: ignore[arg-type]
            )

    def assemble(self) -> None:
        """Puts quantized modules into the model, whose tensors are pages of the journal's files."""
        self.preparation.plan = Plan(rows=tuple(self.rows.values()))
        announce((f for result in self.results.values() for f in result.fallbacks), self.preparation.on_fallback)
        shelf = _Shelf(self.rows)
        floats: dict[str, Tensor] = {}
        for step in range(len(self.blocks) + 1):
            records = self.journal.records(step)
            for name, tensors in self.journal.tensors(step, mapped=True).items():
                if records[name].get("float"):
                    floats.update(tensors)
                else:
                    shelf.tensors[name] = tensors
        slots = tensor_slots(self.model)
        for name, tensor in floats.items():
            _set(slots[name], tensor)
        commit(self.model, self.preparation.plan, shelf, {}, {})


class _Nowhere:
    """Takes weights that are in the journal already."""

    def put(self, key: str, weight: PackedWeight) -> None:
        """Nothing to do."""

    def get(self, key: str) -> PackedWeight:
        """Never asked for."""
        raise KeyError(key)


@dataclass(slots=True)
class _Shelf:
    """Weights of finished blocks."""

    rows: dict[str, PlanRow]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def put(self, key: str, weight: PackedWeight) -> None:
        """Never called."""
        raise KeyError(key)

    def get(self, key: str) -> PackedWeight:
        """The weight of a layer."""
        row = self.rows[key]
        assert row.shape is not None
        return packed_weight(self.tensors[key], row.layout, row.shape)


def _is_packed(row: PlanRow) -> bool:
    return row.scheme is not None and not isinstance(row.scheme.weight, FloatFormat)


def _set(slot: Slot, tensor: Tensor) -> None:
    if slot.is_parameter:
        slot.module._parameters[slot.name] = nn.Parameter(tensor, requires_grad=False)
    else:
        slot.module._buffers[slot.name] = tensor
