"""The default model in transformers, from the dequantized weights of its GGUF file, and what a comparison measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from kvik.models import llama
from kvik.models.gguf_config import config_from_gguf

HEADS, KV_HEADS = 9, 3
WINDOW = 2048
ROWS = 256


class RealModel(NamedTuple):
    """state: by transformers' names, float32, rows in transformers' order."""

    state: Mapping[str, torch.Tensor]

    def transformers(self, dtype: torch.dtype) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
        with no_init_weights():
            model = LlamaForCausalLM(config)
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        model.tie_weights()
        return model.to(dtype).eval()


def load_real_model(path: Path) -> RealModel:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer")}
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    config = config_from_gguf(metadata, shapes, path)
    state = {}
    for spec in llama.tensors(config):
        tensor = tensors[str(spec.gguf)]
        weight = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if spec.permuted_heads:  # rows 2i and 2i + 1 of a head back to i and i + 32
            weight = weight.reshape(spec.permuted_heads, 32, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        state[str(spec.hf)] = torch.from_numpy(weight)
    return RealModel(state)


def english() -> str:
    """Half a million characters that every Python has."""
    return "\n\n".join(topics[name] for name in sorted(topics))


class Difference(NamedTuple):
    """Against the reference's distribution, over all rows: mean KL (nats), top-1 agreement, perplexities."""

    mean_kl: float
    agreement: float
    perplexity: float
    reference_perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.reference_perplexity


class Comparison:
    """Collects windows of logits [T, V] against reference log-probabilities [T, V]."""

    def __init__(self) -> None:
        self._kl: list[torch.Tensor] = []
        self._agree: list[torch.Tensor] = []
        self._surprise: list[torch.Tensor] = []
        self._reference_surprise: list[torch.Tensor] = []

    def add(self, ids: list[int], reference: torch.Tensor, logits: torch.Tensor) -> None:
        targets = torch.tensor(ids[1:])
        for start in range(0, len(ids), ROWS):
            p = reference[start : start + ROWS]
            q = logits[start : start + ROWS].float().log_softmax(-1)
            self._kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
            self._agree.append(p.argmax(-1) == q.argmax(-1))
            target = targets[start : start + ROWS, None]
            self._surprise.append(-q[: len(target)].gather(1, target).double())
            self._reference_surprise.append(-p[: len(target)].gather(1, target).double())

    def result(self) -> Difference:
        return Difference(
            float(torch.cat(self._kl).mean()),
            float(torch.cat(self._agree).double().mean()),
            float(torch.cat(self._surprise).mean().exp()),
            float(torch.cat(self._reference_surprise).mean().exp()),
        )
