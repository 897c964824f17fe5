"""A random model as a Hugging Face folder: what transformers saves, and a small tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from oracles.random_models import vocabulary
from transformers.utils import logging


def save_folder(model: Any, folder: Path) -> Path:
    """config.json, generation_config.json, model.safetensors and tokenizer.json."""
    save_checkpoint(model, folder)
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def save_checkpoint(model: Any, folder: Path) -> None:
    """What transformers itself saves of the model, without a word."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model.save_pretrained(folder)


def _tokenizer() -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(vocabulary.tokens())}
    merges = [tuple(pair.split(" ")) for pair in vocabulary.MERGES]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in vocabulary.SPECIAL])
    return made
