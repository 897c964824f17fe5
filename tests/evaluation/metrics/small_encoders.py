"""Small random encoders in Hugging Face format, and BERTScore written down plainly."""

from __future__ import annotations

import json
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvik.text.vocabulary import BYTE_ALPHABET

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefgh",
    *(f"##{c}" for c in "abcdefgh"),
    "the",
    "cat",
    "sat",
]
LONGEST = 16


def write_bert(folder: Path, seed: int = 0) -> Path:
    """Three layers, texts of 16 tokens."""
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=LONGEST,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=LONGEST).save_pretrained(folder)
    return folder


def write_roberta(folder: Path) -> Path:
    """Byte-level tokens, <s> and </s> around a text."""
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    torch.manual_seed(0)
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTE_ALPHABET, "Ġc"]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    folder.mkdir(parents=True, exist_ok=True)
    vocab.write_text(json.dumps({name: i for i, name in enumerate(names)}))
    merges.write_text("#version: 0.2\nĠ c\n")
    config = RobertaConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=34, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    RobertaTokenizer(str(vocab), str(merges), model_max_length=32).save_pretrained(folder)
    return folder


def by_definition(
    tokenizer: Any, model: Any, layer: int, pairs: list[tuple[str, str]], idf: bool
) -> list[tuple[float, float, float]]:
    """Precision, recall and F1 of (prediction, reference) pairs, as equations 1 to 3 and section 3 of the paper have them."""

    def ids_of(text: str) -> list[int]:
        return tokenizer.encode(text.strip(), truncation=True, max_length=tokenizer.model_max_length)

    def vectors(text: str) -> Any:
        with torch.no_grad():
            found = (
                model(torch.tensor([ids_of(text)]), output_hidden_states=True).hidden_states[layer][0].double().numpy()
            )
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    documents = Counter(token for _, reference in pairs for token in set(ids_of(reference)))

    def weights(text: str) -> list[float]:
        if idf:
            return [log((len(pairs) + 1) / (documents[token] + 1)) for token in ids_of(text)]
        return [float(token not in (tokenizer.cls_token_id, tokenizer.sep_token_id)) for token in ids_of(text)]

    found = []
    for prediction, reference in pairs:
        x, y = vectors(prediction), vectors(reference)
        w, v = weights(prediction), weights(reference)
        p = sum(w[i] * max(float(x[i] @ b) for b in y) for i in range(len(x))) / sum(w)
        r = sum(v[j] * max(float(y[j] @ a) for a in x) for j in range(len(y))) / sum(v)
        found.append((p, r, 2 * p * r / (p + r)))
    return found
