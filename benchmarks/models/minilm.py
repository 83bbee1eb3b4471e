"""The MiniLM-L6 sentence encoder on the SICK-R test pairs.

WordPiece (lower-cased, accents stripped, at most 256 tokens), mean pooling over the mask, cosine similarity; the score
is Spearman's rank correlation with the human ratings. Sentences are de-duplicated and sorted by length, so that one
pass over all 4,927 pairs takes seconds on two cores. The encoder comes as transformers builds it, and once more on
`nn.TransformerEncoder` with the same weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from transformers import AutoConfig, BertModel, BertTokenizer

from . import from_pretrained

__all__ = ["Pairs", "TorchEncoder", "embed", "load_float", "load_pairs", "load_torch", "score", "skeleton"]


def load_float(root: Path) -> BertModel:
    """The float32 encoder in eval mode, without the pooler that sentence embeddings do not use."""
    return from_pretrained(BertModel, root / "encoder" / "minilm_l6", add_pooling_layer=False).eval()


def skeleton(root: Path) -> BertModel:
    """The same architecture on the meta device."""
    config = AutoConfig.from_pretrained(root / "encoder" / "minilm_l6", local_files_only=True)
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    return model.eval()


class TorchEncoder(nn.Module):
    """The same encoder on PyTorch's own layers."""

    def __init__(self, bert: BertModel) -> None:
        super().__init__()
        config = bert.config
        self.embeddings = bert.embeddings
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        with torch.no_grad():
            for ours, theirs in zip(self.encoder.layers, bert.encoder.layer, strict=True):
                attention = theirs.attention
                projections = (attention.self.query, attention.self.key, attention.self.value)
                ours.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
                ours.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
                for to, source in (
                    (ours.self_attn.out_proj, attention.output.dense),
                    (ours.norm1, attention.output.LayerNorm),
                    (ours.linear1, theirs.intermediate.dense),
                    (ours.linear2, theirs.output.dense),
                    (ours.norm2, theirs.output.LayerNorm),
                ):
                    to.load_state_dict(source.state_dict())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """`last_hidden_state` `[B, T, hidden]`, as transformers gives it."""
        hidden = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        return SimpleNamespace(last_hidden_state=hidden)


def load_torch(root: Path) -> TorchEncoder:
    """The float32 encoder on `nn.TransformerEncoder`, in eval mode."""
    return TorchEncoder(load_float(root)).eval()


@dataclass(frozen=True)
class Pairs:
    """SICK-R pairs, tokenized once: distinct sentences and the indices of each pair's two sides."""

    tokens: list[list[int]]
    left: np.ndarray
    right: np.ndarray
    rating: np.ndarray


def load_pairs(root: Path, count: int | None = None) -> Pairs:
    """Reads and tokenizes the first `count` pairs (all 4,927 by default)."""
    records = json.loads((root / "encoder" / "sick_r_test.json").read_text(encoding="utf-8"))[:count]
    # Not from_pretrained: that would look for files the folder does not have.
    tokenizer = BertTokenizer(str(root / "encoder" / "minilm_l6" / "vocab.txt"), do_lower_case=True)
    index: dict[str, int] = {}
    left = np.array([index.setdefault(record["a"], len(index)) for record in records])
    right = np.array([index.setdefault(record["b"], len(index)) for record in records])
    tokens = tokenizer(list(index), truncation=True, max_length=256)["input_ids"]
    return Pairs(tokens=tokens, left=left, right=right, rating=np.array([record["score"] for record in records]))


def batches(pairs: Pairs, *, batch: int = 64) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Model inputs sorted by length, each with the sentences' indices."""
    order = sorted(range(len(pairs.tokens)), key=lambda sentence: len(pairs.tokens[sentence]))
    result = []
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(pairs.tokens[sentence]) for sentence in part], batch_first=True)
        mask = torch.zeros_like(ids)
        for row, sentence in enumerate(part):
            mask[row, : len(pairs.tokens[sentence])] = 1
        result.append((part, {"input_ids": ids, "attention_mask": mask}))
    return result


@torch.inference_mode()
def embed(model: nn.Module, pairs: Pairs, *, batch: int = 64) -> Tensor:
    """Unit-length sentence embeddings, ``[sentences, hidden]``."""
    result: Tensor | None = None
    for part, inputs in batches(pairs, batch=batch):
        hidden = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None].float()
        pooled = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        if result is None:
            result = torch.empty(len(pairs.tokens), pooled.shape[-1])
        result[part] = pooled
    assert result is not None, "no sentences"
    return result


def score(embeddings: Tensor, pairs: Pairs) -> tuple[float, float]:
    """Spearman and Pearson correlation of the pairs' cosine similarity with the human ratings."""
    cosine = (embeddings[pairs.left] * embeddings[pairs.right]).sum(-1).numpy()
    return float(spearmanr(cosine, pairs.rating).statistic), float(pearsonr(cosine, pairs.rating).statistic)
