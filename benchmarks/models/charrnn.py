"""The character LSTMs `charrnn_shakespeare` and `charrnn_h256` on real text, in bits per character.

Characters that the model does not know are dropped, the text is cut into rows of 257, each begins with a zero state; the
score is the mean negative log-likelihood of the first 512 rows, over ln 2.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TEXTS", "CharRNN", "bits_per_character", "load_float", "load_rows"]

# Model to its text: the last or, where positive, the first so many characters.
TEXTS = {"charrnn_shakespeare": ("tinyshakespeare.txt", -140_000), "charrnn_h256": ("bronte_prose.txt", 140_000)}


class CharRNN(nn.Module):
    """Embedding, two LSTM layers, a linear decoder."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, 2, batch_first=True)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of the next character: `[B, T]` to `[B, T, V]`."""
        return self.decoder(self.lstm(self.embedding(characters))[0])


def load_float(root: Path, name: str) -> CharRNN:
    """The float32 model in eval mode."""
    weights = load_file(root / "lm" / name / "model.safetensors")
    model = CharRNN(*weights["embedding.weight"].shape)
    model.load_state_dict(weights)
    return model.eval()


def load_rows(root: Path, name: str, count: int = 512) -> Tensor:
    """The first `count` rows of 257 characters of the model's text."""
    vocabulary = json.loads((root / "lm" / name / "config.json").read_text(encoding="utf-8"))["vocab"]
    file, length = TEXTS[name]
    text = (root / "text" / file).read_text(encoding="utf-8")
    text = text[:length] if length > 0 else text[length:]
    characters = torch.tensor([vocabulary[character] for character in text if character in vocabulary])
    return characters[: len(characters) // 257 * 257].reshape(-1, 257)[:count]


@torch.no_grad()
def bits_per_character(model: nn.Module, rows: Tensor) -> float:
    """Mean negative log-likelihood of every character after the first of its row, in bits."""
    total = 0.0
    for batch in rows.split(64):
        logits = model(batch[:, :-1])
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (rows.shape[1] - 1)) / torch.log(torch.tensor(2.0)).item()
