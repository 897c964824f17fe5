"""Encoders in Hugging Face format: texts to embeddings of their tokens. Needs torch and transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kvik.errors import DataError, ParameterError
from kvik.params.checks import integer
from kvik.weights.encoders import MINILM, encoder_folder
from kvik.weights.fetch import Progress, sha256_of
from kvik.weights.sources import INDEX, SINGLE

__all__ = ["Encoder", "Ids", "open_encoder"]

Ids = tuple[int, ...]


class Encoded(NamedTuple):
    """A text's token ids, those around it included. cut: it has more than the encoder reads."""

    ids: Ids
    cut: bool


_SPACED = ("roberta", "gpt2")
"""Whose first word is written as one in the middle of a text, as the authors of BERTScore have it."""
_UNSAID = 1 << 20
"""A tokenizer that says more than this as its model's longest input says nothing."""
_OFFSET = 2
"""Positions that RoBERTa's kind leaves unused."""


class Encoder:
    """A model that embeds tokens, opened by `open_encoder`.

    Attributes:
        name: for signatures, with a digest of the weights.
        layer, layers: whose output is taken, and how many there are.
        longest: tokens of a text that are read, the ones around it included.
        around: tokens that are put around a text.
        versions: of the libraries that compute.
    """

    def __init__(self, name: str, layer: int, tokenizer: Any, model: Any) -> None:
        import torch
        import transformers

        self.name, self.layer, self.layers = name, layer, int(model.config.num_hidden_layers)
        self.around = frozenset(t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None)
        self.longest = _longest(tokenizer, model.config)
        self.versions: Mapping[str, str] = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._tokenizer, self._model = tokenizer, model
        self._front = " " if model.config.model_type in _SPACED else ""

    def encode(self, text: str) -> Encoded:
        """A text's tokens, stripped of whitespace around it."""
        stripped = self._front + text.strip()
        with _quiet():
            ids = self._tokenizer.encode(stripped, truncation=True, max_length=self.longest)
            cut = len(ids) >= self.longest and len(self._tokenizer.encode(stripped)) > self.longest
        return Encoded(tuple(ids), cut)

    def embed(self, texts: Sequence[Ids]) -> list[Any]:
        """Unit vectors [T, D] float32 of the tokens of each text, tensors of torch."""
        import torch

        size = max(map(len, texts))
        ids = torch.full((len(texts), size), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            units = torch.nn.functional.normalize(states[self.layer].float(), dim=-1)
        return [units[row, : len(text)] for row, text in enumerate(texts)]


def open_encoder(
    encoder: str | os.PathLike[str] | Encoder | None = None, layer: int | None = None, progress: Progress | None = None
) -> Encoder:
    """Open the encoder in a folder; None is MiniLM, fetched where it is not here.

    layer: whose output is taken, 0 (the input embeddings) to all. None: three quarters of them, rounded up, which gives what
    the authors of BERTScore chose for BERT of 6, 12 and 24 layers (5, 9, 18), MiniLM's kind. Nothing of the folder is run
    as code, and only safetensors are read.
    Raises ParameterError (torch or transformers are missing, no such layer), DataError for a folder that is no encoder.
    """
    if isinstance(encoder, Encoder):
        if layer not in (None, encoder.layer):
            raise ParameterError(f"layer is {layer}, but this encoder was opened for layer {encoder.layer}")
        return encoder
    transformers = _transformers()
    from safetensors import SafetensorError

    folder = encoder_folder(MINILM, progress=progress) if encoder is None else Path(encoder)
    _check_folder(folder)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="float32"
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(f"is no encoder: {lines[0] if lines else type(error).__name__}", path=folder) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    layers = int(model.config.num_hidden_layers)
    if layer is None:
        layer = -(-3 * layers // 4)
    integer("layer", layer, 0, layers)
    name = (
        f"{MINILM.name}({MINILM.model},{MINILM.package}-{MINILM.version})"
        if encoder is None
        else f"{folder.resolve().name}({_digest(folder)})"
    )
    return Encoder(name, layer, tokenizer, model.eval())


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ParameterError(f'bertscore needs {error.name}: pip install "kvik[bertscore]"') from error
    return transformers


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError("is no folder of an encoder", path=folder)
    if not (folder / "config.json").is_file():
        raise DataError("is no folder of an encoder: it holds no config.json", path=folder)
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise DataError(f"is no folder of an encoder: it holds neither {SINGLE} nor {INDEX}", path=folder)


def _digest(folder: Path) -> str:
    """Of the weights, shortened."""
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    return "sha256-" + ".".join(sha256_of(file)[:12] for file in files)


def _longest(tokenizer: Any, config: Any) -> int:
    said = int(min(tokenizer.model_max_length, _UNSAID))
    positions = getattr(config, "max_position_embeddings", None)
    if said < _UNSAID:
        return said
    if positions is None:
        raise DataError("tokenizer_config.json does not say model_max_length", path=tokenizer.name_or_path)
    return int(positions) - (_OFFSET if "roberta" in config.model_type else 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without progress bars and advice."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
