"""A model of transformers whose logits are a table's row, chosen by a hash of all tokens: any number of steps in no time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ROWS = 1009


class TableConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "table"

    def __init__(self, vocab_size: int = 50, seed: int = 0, **more: Any) -> None:
        self.vocab_size, self.seed = vocab_size, seed
        super().__init__(**more)


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """ends: these tokens' logits are raised by `rise`, so that they are reached."""

    config_class = TableConfig

    def __init__(self, vocab_size: int, seed: int, ends: tuple[int, ...] = (), rise: float = 0.0) -> None:
        super().__init__(TableConfig(vocab_size, seed, eos_token_id=None, pad_token_id=None, bos_token_id=None))
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 1.5, (ROWS, vocab_size)).astype(np.float32)
        self.table[:, list(ends)] += rise
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def row(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """Logits [V] after the tokens."""
        seen = 7
        for token in tokens:
            seen = (seen * 31 + token + 1) % (2**31 - 1)
        found: np.ndarray[Any, Any] = self.table[seen % ROWS]
        return found

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Any, **more: Any) -> Any:
        rows = np.stack([self.row(tokens) for tokens in input_ids.tolist()])
        return CausalLMOutput(logits=torch.from_numpy(rows)[:, None])


def generate(model: Any, prompt: list[int], ends: tuple[int, ...], **settings: Any) -> list[tuple[list[int], float]]:
    """transformers' beam search: tokens and score of each answer, padding left out."""
    pad = 0
    config = GenerationConfig(
        do_sample=False, eos_token_id=list(ends) or None, pad_token_id=pad, return_dict_in_generate=True,
        output_scores=True, use_cache=False, **settings,
    )  # fmt: skip
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
    answers = []
    for row, score in zip(found.sequences[:, len(prompt) :].tolist(), found.sequences_scores.tolist(), strict=True):
        cut = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append((row[:cut], score))
    return answers
