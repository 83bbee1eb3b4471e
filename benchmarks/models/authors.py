"""Who wrote this line? A bag of words and word pairs, trained on three authors' prose and quantized.

The classifier is `nn.EmbeddingBag` over hashed words and pairs of neighbours, then a linear layer: what fastText does (Joulin
et al. 2016, arXiv:1607.01759). Passages of 24 words; every tenth is kept for testing.
"""

import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["AuthorClassifier", "Passages", "accuracy", "load_passages", "train"]

# Where an author's part of the text begins.
AUTHORS = {
    "C. Brontë": "Jane Eyre",
    "C. Darwin": "ON THE ORIGIN OF SPECIES.",
    "W. E. B. Du Bois": "POSTSCRIPT\n\n\nThese are the things of which men think",
}
CHARACTERS, WORDS, BUCKETS = 600_000, 24, 1 << 16


@dataclass(frozen=True)
class Passages:
    """Hashed words of all passages, where each begins, and who wrote it."""

    features: list[Tensor]
    author: Tensor

    def bags(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and offsets of some passages."""
        parts = [self.features[i] for i in which.tolist()]
        lengths = torch.tensor([len(part) for part in parts])
        return torch.cat(parts), lengths.cumsum(0) - lengths


def load_passages(root: Path) -> tuple[Passages, Tensor, Tensor]:
    """All passages, and the numbers of those to train on and to test on."""
    text = (root / "text" / "novels_train.txt").read_text(encoding="utf-8")
    features: list[Tensor] = []
    author: list[int] = []
    for number, beginning in enumerate(AUTHORS.values()):
        start = text.index(beginning)
        words = re.findall(r"[a-z']+", text[start : start + CHARACTERS].lower())
        for at in range(0, len(words) - WORDS + 1, WORDS):
            some = words[at : at + WORDS]
            terms = [*some, *(f"{a} {b}" for a, b in pairwise(some))]
            features.append(torch.tensor([zlib.crc32(term.encode()) % BUCKETS for term in terms]))
            author.append(number)
    numbers = torch.arange(len(features))
    return Passages(features, torch.tensor(author)), numbers[numbers % 10 != 0], numbers[numbers % 10 == 0]


class AuthorClassifier(nn.Module):
    """Mean of embedded terms, then a linear layer: `[N]` indices and `[B]` offsets to `[B, authors]`."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, 64, mode="mean")
        self.head = nn.Linear(64, len(AUTHORS))

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(indices, offsets))


def train(passages: Passages, which: Tensor, *, epochs: int = 2) -> AuthorClassifier:
    """Trains a classifier; seconds on one core."""
    torch.manual_seed(0)
    model = AuthorClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in which[torch.randperm(len(which))].split(256):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(*passages.bags(batch)), passages.author[batch])
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, passages: Passages, which: Tensor) -> float:
    """Part of the passages whose author is found."""
    found = model(*passages.bags(which)).argmax(dim=1)
    return (found == passages.author[which]).float().mean().item()
