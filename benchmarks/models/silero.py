"""Silero's voice activity detector: convolutions over 32 ms of sound, then an LSTM cell whose state is carried on."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["VoiceActivity", "load_chunks", "load_expected", "load_float", "probabilities"]

_CHUNK, _CONTEXT = 512, 64


class VoiceActivity(nn.Module):
    """The probability of speech in each chunk of 512 samples at 16 kHz, given the 64 samples before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def features(self, chunks: Tensor) -> Tensor:
        """`[B, 576]` samples to `[B, 128]`; chunks do not depend on one another here."""
        x = nn.functional.pad(chunks.unsqueeze(1), (0, _CONTEXT), mode="reflect")
        real, imaginary = self.stft_conv(x).chunk(2, dim=1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        return x.squeeze(-1)

    def forward(self, feature: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Probability of one chunk from its features `[1, 128]`, and the state for the next one."""
        h, c = self.lstm_cell(feature, state)
        return self.final_conv(h.relu().unsqueeze(-1)).sigmoid().flatten(), (h, c)


def load_float(root: Path) -> VoiceActivity:
    """The float32 model in eval mode."""
    model = VoiceActivity()
    model.load_state_dict(load_file(root / "audio" / "silero_vad" / "model.safetensors"))
    return model.eval()


def load_chunks(root: Path) -> Tensor:
    """A minute of speech, `[1875, 576]`: every chunk after the end of the one before, silence before the first."""
    pcm = np.load(root / "audio" / "silero_vad" / "test_16k.npz")["pcm"]
    samples = nn.functional.pad(torch.from_numpy(pcm.astype(np.float32) / 32768), (_CONTEXT, 0))
    return samples.unfold(0, _CONTEXT + _CHUNK, _CHUNK)


def load_expected(root: Path) -> Tensor:
    """The probabilities that the published float32 model gives."""
    return torch.from_numpy(np.load(root / "audio" / "silero_vad" / "expected_probs.npz")["prob"])


@torch.no_grad()
def probabilities(model: VoiceActivity, chunks: Tensor) -> Tensor:
    """The probability of speech in each chunk, one after another."""
    state = (torch.zeros(1, 128), torch.zeros(1, 128))
    result = []
    for feature in model.features(chunks).split(1):
        probability, state = model(feature, state)
        result.append(probability)
    return torch.cat(result)
