"""What stands where a batch normalization was folded into the layer before it."""

from __future__ import annotations

from torch import Tensor, nn


class FoldedBatchNorm(nn.Module):
    """Gives back its input. Files name it, so that `load_` folds the model that it loads into alike.

    Args:
        into: Qualified name of the layer whose weight and bias took the normalization in.
    """

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def extra_repr(self) -> str:
        """The layer, for `print(model)`."""
        return f"into={self.into!r}"
