"""Second moments of a layer's inputs, `H = mean(x x^T)`, and the triangular factor that GPTQ rounds with.

Where layers before it are quantized already, a layer gets x instead of the float model's y. What it should make of x is what
the float layer makes of y: in the least-squares sense the weight `W* = W G H^-1` with `G = mean(y x^T)`. Kept is the drift
`D = G - H = mean((y - x) x^T)`, which is small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte import ops
from halfbyte.calibration import InputStatistics, tokens_of
from halfbyte.errors import QuantizationError
from halfbyte.processes import Processes

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_DAMPING = 1e6
_BLOCK = 128
_TILE = 48  # width of what `ops.hessian_tiles` gives


class InputHessian(InputStatistics):
    """`H` of a module's inputs over all tokens seen; registered as a forward pre-hook.

    A convolution with groups of channels has one for each group: `matrix()` is their mean. Several small ones are collected
    as one over the inputs of several groups, of which the squares on the diagonal count.

    Holds `4 I^2` bytes a group: the lower triangle in float64; the drift, where there is one, takes twice as many.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._tiles: Tensor | None = None  # of each set of groups
        self._drift: Tensor | None = None
        self._features = 0
        self.groups = 1
        self._factor: tuple[float, Tensor, tuple[Tensor, float]] | None = None

    def _add(self, rows: Tensor) -> None:
        self._add_groups(rows[None])

    def _add_groups(self, rows: Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise self._not_finite()
        if self._tiles is None:
            self.groups, self._features = rows.shape[0], rows.shape[2]
            self._tiles = self._no_tiles()
        self._factor = None
        rows = rows if rows.dtype in _FLOAT_DTYPES else rows.float()
        if self.groups > 1:
            rows = F.pad(rows, (0, 0, 0, 0, 0, -self.groups % self._together))
            rows = rows.reshape(-1, self._together, *rows.shape[1:]).transpose(1, 2).flatten(2)
        for tiles, part in zip(self._tiles, rows, strict=True):
            ops.hessian_update_(tiles, part)

    @property
    def _together(self) -> int:
        """Groups whose inputs are taken as those of one, to fill a tile."""
        return min(self.groups, max(1, _TILE // self._features))

    def _no_tiles(self) -> Tensor:
        tiles = ops.hessian_tiles(self._together * self._features)
        return torch.zeros(-(-self.groups // self._together), *tiles.shape, dtype=tiles.dtype)

    def update_drift(self, x: Tensor, float_x: Tensor) -> None:
        """Adds to the drift of a batch `[..., I]` that `update` was given.

        Args:
            x: The inputs that the quantized layers before produce.
            float_x: Those of the float model, of the same shape.

        Raises:
            QuantizationError: NaN or inf among the inputs of the float model.
        """
        rows, float_rows = tokens_of(x), tokens_of(float_x)
        if not torch.isfinite(float_rows).all():
            raise self._not_finite()
        if self._drift is None:
            self._drift = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows if rows.dtype in _FLOAT_DTYPES else rows.float()
        ops.cross_hessian_update_(self._drift, (float_rows - rows).to(rows.dtype), rows)

    def add_up(self, processes: Processes, features: int, groups: int) -> None:
        """Replaces the sums by those of all processes.

        Args:
            processes: Each has its own sums.
            features, groups: I and the number of Hessians, for a process that no token reached.
        """
        if self._tiles is None:
            self._features, self.groups = features, groups
            self._tiles = self._no_tiles()
        processes.add_up_(self._tiles)
        if any(processes.gather(self._drift is not None)):
            if self._drift is None:
                self._drift = torch.zeros(features, features, dtype=torch.float64)
            processes.add_up_(self._drift)
        self.tokens, self.batches = map(sum, zip(*processes.gather((self.tokens, self.batches)), strict=True))

    def begin_share(self) -> None:
        """Sets aside what was seen, until `end_share`."""
        self._aside_tiles, self._tiles = self._tiles, None
        super().begin_share()

    def abandon_share(self) -> None:
        """Forgets what was seen since `begin_share`."""
        super().abandon_share()
        self._tiles = self._aside_tiles

    def end_share(self) -> None:
        """Adds what all processes of the default group have seen since to what was set aside."""
        super().end_share()
        processes = Processes()
        self._features, self.groups = max(processes.gather((self._features, self.groups)))
        if not self._features:
            return
        if self._tiles is None:
            self._tiles = self._no_tiles()
        processes.add_up_(self._tiles)
        if self._aside_tiles is not None:
            self._tiles += self._aside_tiles

    def factor(self, matrix: Tensor, damping: float, order: Tensor) -> tuple[Tensor, float]:
        """`reversed_cholesky(matrix, damping, order)`, kept for the next layer that gets the same inputs.

        Args:
            matrix: What `matrix()` gave.
            damping, order: As there.
        """
        if self._factor is None or self._factor[0] != damping or not torch.equal(self._factor[1], order):
            self._factor = None  # not two at a time
            self._factor = (damping, order, reversed_cholesky(matrix, damping, order))
        return self._factor[2]

    def forget_factor(self) -> None:
        """Lets the next call of `factor` compute it."""
        self._factor = None

    @property
    def mean_square(self) -> Tensor:
        """`[I]` float32, the diagonal of H."""
        return self.matrix().diagonal().float()

    def matrix(self) -> Tensor:
        """`[I, I]` float64; the mean over groups.

        Raises:
            QuantizationError: the module never ran.
        """
        if self._tiles is None or self.tokens == 0:
            raise self._never_ran()
        if self.groups > 1:
            return self._sums_of_groups().sum(0).div_(self.tokens)
        return ops.hessian_matrix(self._tiles[0], self._features).div_(self.tokens)

    def of_groups(self) -> list[InputHessian]:
        """That of each group of channels."""
        if self._tiles is None or self.tokens == 0:
            raise self._never_ran()
        if self.groups == 1:
            return [self]
        return [_GroupHessian(self._name, sums, self.tokens // self.groups) for sums in self._sums_of_groups()]

    def _sums_of_groups(self) -> Tensor:
        """`[groups, I, I]`."""
        assert self._tiles is not None
        parts = []
        for tiles in self._tiles:
            joint = ops.hessian_matrix(tiles, self._together * self._features)
            squares = joint.view(self._together, self._features, self._together, self._features)
            parts.append(squares.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return torch.cat(parts)[: self.groups]

    def discard_drift(self) -> None:
        """As if `update_drift` had never been called."""
        self._drift = None

    def drift(self) -> Tensor | None:
        """`[I, I]` float64, or None where the float model's inputs were not given."""
        return None if self._drift is None else self._drift / self.tokens


class _GroupHessian(InputHessian):
    """That of one group of channels, taken out of all."""

    def __init__(self, name: str, sums: Tensor, tokens: int) -> None:
        super().__init__(name)
        self._sums, self.tokens = sums, tokens

    def matrix(self) -> Tensor:
        return self._sums / self.tokens


def hessian_bytes(in_features: int, *, drift: bool) -> int:
    """Memory that collecting and using one Hessian takes: sums, the matrix in float64, three copies in float32.

    With a drift: its sum and its mean in float64, and one copy in float32.
    """
    return (44 if drift else 24) * in_features**2


def retarget(weight: Tensor, factor: Tensor, order: Tensor, drift: Tensor, strength: float) -> Tensor:
    """`W + strength W D H^-1`: the weight that makes of drifted inputs what `weight` makes of the float model's.

    Args:
        weight: `[O, I]`.
        factor: `[I, I]` float32, what `reversed_cholesky(H, damping, order)` gives.
        order: `[I]`, a permutation.
        drift: `[I, I]`, D.
        strength: 1 for the least-squares solution; less where tokens are few, since what was fitted to them does not all
            hold for others.

    Returns:
        `[O, I]` float32.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> order = torch.arange(2)
        >>> factor, _ = reversed_cholesky(h, 0.0, order)
        >>> retarget(torch.ones(1, 2), factor, order, -0.5 * h, strength=1.0)
        tensor([[0.5000, 0.5000]])
    """
    wanted = weight.float() @ drift.float()
    # rows of wanted (R R^T)^-1 = (wanted R^-T) R^-1
    solved = torch.linalg.solve_triangular(factor.T, wanted[:, order], upper=False, left=False)
    solved = torch.linalg.solve_triangular(factor, solved, upper=True, left=False)
    change = torch.empty_like(solved)
    change[:, order] = solved
    return weight.float() + strength * change


def reversed_cholesky(hessian: Tensor, damping: float, order: Tensor) -> tuple[Tensor, float]:
    """Upper triangular R with `H + damping * mean(diag H) * I = R R^T`, columns taken in `order`.

    Computed in float32; where that breaks down in float64; where that does too, with twice the damping, and so on.

    Args:
        hessian: `[I, I]` float64, symmetric.
        damping: Relative to the mean of the diagonal, positive or zero.
        order: `[I]`, a permutation.

    Returns:
        R, `[I, I]` float32 with rows and columns in `order`; and the damping that was used.

    Raises:
        QuantizationError: no damping helps: H is not finite.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> r, damping = reversed_cholesky(h, 0.0, torch.arange(2))
        >>> torch.allclose(r @ r.T, h.float())
        True
    """
    mean = hessian.diagonal().mean().item()
    reverse = order.flip(0)
    matrix = hessian[reverse][:, reverse]
    diagonal = matrix.diagonal().clone()
    used = damping
    while used < _LARGEST_DAMPING:
        matrix.diagonal().copy_(diagonal + used * (mean if mean > 0 else 1.0))
        for dtype in (torch.float32, torch.float64):
            lower, failed = _cholesky(matrix.to(dtype))
            factor = lower.flip(0, 1).float()
            if not failed and bool((factor.diagonal() > 0).all()) and bool(torch.isfinite(factor).all()):
                return factor, used
        used = max(2 * used, 1e-6)
    raise QuantizationError("the Hessian of the inputs is not finite, or negative far beyond rounding errors")


def _cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower Cholesky factor, and whether it failed.

    LAPACK's own gives other last bits for every number of threads. In blocks of 128 columns, left-looking, nearly all of the
    work is in products of whole blocks, which do not; and blocks of that size it factors alone.
    """
    size = -(-len(matrix) // _BLOCK) * _BLOCK
    padded = torch.eye(size, dtype=matrix.dtype)
    padded[: len(matrix), : len(matrix)] = matrix
    lower = torch.zeros_like(padded)
    for begin in range(0, size, _BLOCK):
        end = begin + _BLOCK
        columns = padded[begin:, begin:end]
        if begin:
            columns = torch.addmm(columns, lower[begin:, :begin], lower[begin:end, :begin].T, alpha=-1)
        diagonal, failed = torch.linalg.cholesky_ex(columns[:_BLOCK])
        if failed.item():
            return lower, True
        lower[begin:end, begin:end] = diagonal
        if end < size:
            lower[end:, begin:end] = torch.linalg.solve_triangular(diagonal.T, columns[_BLOCK:], upper=True, left=False)
    return lower[: len(matrix), : len(matrix)], False
