"""Two small Llama language models with real text: float baselines, evaluation rows, and distances between models.

``novels5M`` has 5.0 M parameters (hidden 256, every matrix divisible by 256), ``stories260K`` 0.26 M (hidden 64,
feed-forward 172). Each evaluation text is cut into *rows* of tokens, and every row is scored on its own:

- novels5M: the text is encoded whole and cut into rows of 256 tokens.
- stories260K: one row a story, BOS + tokens, at most 256, no EOS.

Rows of different lengths are padded on the right, which a causal model cannot see.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, LlamaForCausalLM

from . import from_pretrained

__all__ = [
    "MODELS",
    "Distance",
    "Text",
    "evaluate",
    "greedy",
    "load_float",
    "load_text",
    "log_probs",
    "plant_outliers",
    "ratio_of_sums",
    "skeleton",
]

MODELS = ("novels5M", "stories260K")
ROW = 256
_EVAL_TEXT = {"novels5M": "novels_eval.txt", "stories260K": "tinystories_eval.txt"}
_CALIB_TEXT = {"novels5M": "novels_train.txt", "stories260K": "tinystories_calib.txt"}
_PROMPT = {"novels5M": "It was a cold evening, and the", "stories260K": ""}
_STORY_SEPARATOR = "\n<|endoftext|>\n"


def load_float(root: Path, name: str) -> LlamaForCausalLM:
    """The float32 model in eval mode."""
    return from_pretrained(LlamaForCausalLM, root / "lm" / name).eval()


def skeleton(root: Path, name: str) -> LlamaForCausalLM:
    """The same architecture on the meta device: no weights are read or allocated."""
    config = AutoConfig.from_pretrained(root / "lm" / name, local_files_only=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.eval()


class _StoriesTokenizer:
    """llama2.c's BPE for ``tok512.bin``: merge the adjacent pair whose union has the best score until none is left."""

    BOS = 1
    BYTE_OFFSET = 3

    def __init__(self, path: Path) -> None:
        blob = path.read_bytes()
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        at = 4  # the first int32 is the longest piece's length
        while at < len(blob):
            score, length = struct.unpack_from("<fi", blob, at)
            self.scores.append(score)
            self.pieces.append(blob[at + 8 : at + 8 + length])
            at += 8 + length
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        tokens = [self.BOS]
        if not text:
            return tokens
        tokens.append(self.ids[b" "])
        for character in text:
            raw = character.encode()
            tokens += [self.ids[raw]] if raw in self.ids else [byte + self.BYTE_OFFSET for byte in raw]
        while True:
            best: tuple[float, int, int] | None = None
            for index in range(len(tokens) - 1):
                merged = self.ids.get(self.pieces[tokens[index]] + self.pieces[tokens[index + 1]])
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = (self.scores[merged], index, merged)
            if best is None:
                return tokens
            tokens[best[1] : best[1] + 2] = [best[2]]

    def decode(self, tokens: Sequence[int]) -> str:
        raw = b""
        for token in tokens:
            if token <= 2:  # <unk>, BOS, EOS
                continue
            is_byte = token < self.BYTE_OFFSET + 256
            raw += bytes([token - self.BYTE_OFFSET]) if is_byte else self.pieces[token]
        return raw.decode(errors="replace").removeprefix(" ")


@dataclass(frozen=True)
class Text:
    """Tokenized text of one model: rows to evaluate, rows to calibrate on, and a prompt with its decoder."""

    evaluation: list[Tensor]
    calibration: list[Tensor]
    prompt: Tensor
    decode: Callable[[Sequence[int]], str]


def load_text(root: Path, name: str, *, rows: int | None = None, calibration_rows: int = 32) -> Text:
    """Tokenizes the evaluation and calibration texts of `name`.

    Args:
        root: The shared data folder.
        name: One of `MODELS`.
        rows: Evaluation rows to keep; by default 200 windows or all 180 stories.
        calibration_rows: Rows of the calibration text, which is disjoint from the evaluation text.
    """
    folder = root / "lm" / name
    evaluation = (root / "text" / _EVAL_TEXT[name]).read_text(encoding="utf-8")
    calibration = (root / "text" / _CALIB_TEXT[name]).read_text(encoding="utf-8")
    if name == "novels5M":
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def windows(text: str, count: int) -> list[Tensor]:
            ids = tokenizer.encode(text).ids
            return [torch.tensor(ids[at : at + ROW]) for at in range(0, len(ids) - ROW + 1, ROW)][:count]

        # A token is about three characters; six a token leave enough without encoding all ten megabytes.
        middle = len(calibration) // 2
        excerpt = calibration[middle : middle + calibration_rows * ROW * 6]
        return Text(
            evaluation=windows(evaluation, 200 if rows is None else rows),
            calibration=windows(excerpt, calibration_rows),
            prompt=torch.tensor([tokenizer.encode(_PROMPT[name]).ids]),
            decode=tokenizer.decode,
        )
    stories = _StoriesTokenizer(folder / "tok512.bin")

    def per_story(text: str, count: int | None) -> list[Tensor]:
        parts = [part for part in text.split(_STORY_SEPARATOR) if part.strip()][:count]
        return [torch.tensor(stories.encode(part)[:ROW]) for part in parts]

    return Text(
        evaluation=per_story(evaluation, rows),
        calibration=per_story(calibration, calibration_rows),
        prompt=torch.tensor([stories.encode(_PROMPT[name])]),
        decode=stories.decode,
    )


@torch.inference_mode()
def log_probs(model: nn.Module, rows: Sequence[Tensor], *, batch: int = 8) -> list[Tensor]:
    """Next-token log-probabilities, ``[len(row) - 1, vocabulary]`` float32 for every row."""
    result = []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        logits = model(input_ids=nn.utils.rnn.pad_sequence(list(part), batch_first=True), use_cache=False).logits
        result += [torch.log_softmax(logits[index, : len(row) - 1].float(), dim=-1) for index, row in enumerate(part)]
    return result


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Ratio of the sums of two quantities over the same rows, and the half-width of its 95 % interval: a paired comparison.

    Tokens of a row depend on each other, so the row is the unit; linearized variance.
    """
    sums, counts = (torch.tensor(values, dtype=torch.float64) for values in (numerators, denominators))
    total, rows = counts.sum(), len(sums)
    mean = sums.sum() / total
    if rows < 2:
        return mean.item(), math.nan
    residuals = sums - mean * counts
    return mean.item(), (1.96 * math.sqrt(rows / (rows - 1)) * residuals.square().sum().sqrt() / total).item()


@dataclass(frozen=True)
class Distance:
    """What a model scores on some rows and, where a reference was given, how far it is from that reference."""

    perplexity: float
    tokens: int
    perplexity_change: float = 0.0
    """Relative to the reference: 0.01 is one percent worse."""
    perplexity_change_ci: float = 0.0
    kl: float = 0.0
    """Mean KL(reference || model) in nats a token."""
    kl_ci: float = 0.0
    same_top1: float = 1.0
    row_nll: list[float] = field(default_factory=list, repr=False)
    row_kl: list[float] = field(default_factory=list, repr=False)
    """Sums over the tokens of each row."""


def evaluate(
    model: nn.Module, rows: Sequence[Tensor], reference: Sequence[Tensor] | None = None, *, batch: int = 8
) -> Distance:
    """Perplexity of `model` over `rows` and its distance to the `log_probs` of a reference model.

    Half-widths are of 95 % intervals with the row as the unit; the change of perplexity is paired, row by row.
    """
    nll: list[float] = []
    kl: list[float] = []
    nll_difference: list[float] = []
    counts: list[int] = []
    same = 0
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        for offset, (row, ours) in enumerate(zip(part, log_probs(model, part, batch=batch), strict=True)):
            target = row[1:, None]
            nll.append(-ours.gather(1, target).double().sum().item())
            counts.append(len(ours))
            if reference is not None:
                theirs = reference[at + offset]
                kl.append((theirs.double().exp() * (theirs.double() - ours.double())).sum().item())
                same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
                nll_difference.append(nll[-1] + theirs.gather(1, target).double().sum().item())
    total = sum(counts)
    perplexity = math.exp(sum(nll) / total)
    if reference is None:
        return Distance(perplexity=perplexity, tokens=total, row_nll=nll)
    kl_mean, kl_ci = ratio_of_sums(kl, counts)
    change, change_ci = ratio_of_sums(nll_difference, counts)
    return Distance(
        perplexity=perplexity,
        tokens=total,
        perplexity_change=math.expm1(change),
        perplexity_change_ci=math.exp(change) * change_ci,
        kl=kl_mean,
        kl_ci=kl_ci,
        same_top1=same / total,
        row_nll=nll,
        row_kl=kl,
    )


@torch.no_grad()
def plant_outliers(model: LlamaForCausalLM, factor: float, channels: int = 4) -> None:
    """Multiplies the `channels` largest gains of every norm inside a block, and divides in the layers that read them.

    The model computes what it did.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            chosen = norm.weight.abs().topk(channels).indices
            norm.weight[chosen] *= factor
            for reader in readers:
                reader.weight[:, chosen] /= factor


def greedy(model: LlamaForCausalLM, text: Text, *, new_tokens: int = 48) -> str:
    """Greedy continuation of the model's prompt through ``model.generate``, prompt included."""
    output = model.generate(
        text.prompt,
        attention_mask=torch.ones_like(text.prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return text.decode(output[0].tolist())
