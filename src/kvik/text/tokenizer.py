"""Text to token ids and back, without losing a byte."""

from __future__ import annotations

import json
import mmap
import sys
import zlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.errors import DataError, ParameterError, StorageError
from kvik.files import atomic_write
from kvik.text.bpe import BPE, pack_bpe
from kvik.text.cutting import Prefix, TextSteps
from kvik.text.literals import Literal, LiteralFinder

if TYPE_CHECKING:
    from kvik.text.vocabulary import Vocabulary

__all__ = ["Tokenizer", "check_text"]

_SETTINGS, _TABLES = "kvik_tokenizer.json", "kvik_tokenizer.bin"
_FORMAT = 3
_REMEDY = "delete the folder to have it made again"


class Tokenizer:
    """A byte-level or SentencePiece BPE tokenizer.

    `decode_bytes(encode(text, add_special=False))` is `text.encode()` for every text, with these exceptions, which a
    hub's `tokenizer.json` can ask for: a normalizer (NFC, …) gives back the normalized text; a vocabulary that puts a
    space only where none is ("▁" by Metaspace, `add_prefix_space`) loses a text's first one; literal tokens with
    `lstrip` or `rstrip` swallow whitespace. Safe to share between threads.

    Attributes:
        vocab_size: number of token ids.
        bos_id: the beginning-of-text token, if there is one.
        eos_ids: tokens that end a turn or a document.
        special_ids: tokens that ordinary text never becomes (beginning, end, padding, roles, …).
        add_bos, add_eos: what `encode(add_special=True)` puts around the ids.
        chat_template, tool_template: the model's templates, where it has them; the latter for conversations with tools.
    """

    def __init__(self, bpe: BPE, settings: Mapping[str, Any], tables: bytes | memoryview) -> None:
        """Use `from_gguf` or `load`. `settings` is what `save` writes beside the tables."""
        self._bpe, self._settings, self._tables = bpe, dict(settings), tables
        self.vocab_size: int = bpe.size
        self.bos_id: int | None = settings["bos_id"]
        self.eos_ids: frozenset[int] = frozenset(settings["eos_ids"])
        self.add_bos: bool = settings["add_bos"]
        self.add_eos: bool = settings["add_eos"]
        self.special_ids: frozenset[int] = frozenset(settings["special_ids"])
        self.chat_template: str | None = settings["chat_template"]
        self.tool_template: str | None = settings["tool_template"]
        self._eos_id: int | None = settings["eos_id"]
        self._literals = [Literal(*entry) for entry in settings["literals"]]
        self._special_texts = tuple(entry.text for entry in self._literals if entry.token in self.special_ids)
        self._texts = {entry.token: entry.text for entry in self._literals}
        self._ordinary_literals = frozenset(self._texts) - self.special_ids
        self._prefix: str = settings["prefix"]
        # At the beginning and after these, a piece's space is the one that was put there, unless it is its own.
        self._own_space = frozenset(entry.token for entry in self._literals if not entry.normalized)
        self._spaced_after: frozenset[int] = frozenset()
        if self._prefix == Prefix.FIRST and self.bos_id is not None:
            self._spaced_after = frozenset((self.bos_id,))
        elif self._prefix in (Prefix.EACH, Prefix.BARE):
            self._spaced_after = self._own_space
        self._steps = TextSteps(settings["normalizers"], settings["cuts"], self._prefix, settings["units"])
        self._finders: dict[str, LiteralFinder] = {}
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """The tokenizer that GGUF metadata describes. Raises DataError naming the key that does not fit."""
        from kvik.text.gguf_vocab import read_vocabulary

        return cls._made(read_vocabulary(metadata))

    @classmethod
    def from_hub(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a folder as model hubs have it, from `tokenizer.json` and, where they are there,
        `tokenizer_config.json`, `generation_config.json`, `config.json` and `chat_template.jinja`.

        Raises DataError naming the file and the place in it that does not fit or that Kvik does not know.
        """
        from kvik.text.hub_tokenizer import read_hub

        return cls._made(read_hub(Path(folder)))

    @classmethod
    def _made(cls, v: Vocabulary) -> Tokenizer:
        tables = pack_bpe(v.pieces, v.merges, v.bytes_to_id, v.chars_to_id, v.words)
        settings = {
            "format": _FORMAT, "byteorder": sys.byteorder,
            "bos_id": v.bos_id, "eos_id": v.eos_id, "eos_ids": sorted(v.eos_ids),
            "add_bos": v.add_bos, "add_eos": v.add_eos,
            "special_ids": sorted(v.special_ids), "literals": sorted(v.literals),
            "normalizers": v.normalizers, "cuts": v.cuts, "prefix": v.prefix, "units": v.units,
            "chat_template": v.chat_template, "tool_template": v.tool_template,
        }  # fmt: skip
        settings["crc32"] = _checksum(settings, tables)
        return cls(BPE(tables), settings, tables)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """A tokenizer that `save` wrote. Raises DataError when it is missing, damaged or of another version."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / _SETTINGS).read_bytes())
            with (folder / _TABLES).open("rb") as file:
                tables = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if settings["format"] != _FORMAT or settings["byteorder"] != sys.byteorder:
                raise DataError(f"{_SETTINGS} was saved by another version of Kvik; {_REMEDY}", path=folder)
            if settings["crc32"] != _checksum(settings, tables):
                raise DataError(f"the saved tokenizer is damaged; {_REMEDY}", path=folder)
            return cls(BPE(tables), settings, tables)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            reason = f"{Path(error.filename).name} is missing or no file"
            raise DataError(f"no saved tokenizer: {reason}; {_REMEDY}", path=folder) from None
        except OSError as error:
            raise StorageError(f"{folder}: cannot read the tokenizer: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the saved tokenizer is damaged; {_REMEDY}", path=folder) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder, made if needed. Raises StorageError; nothing is left half-written."""
        settings = json.dumps(self._settings, ensure_ascii=False, indent=1).encode()
        for name, data in ((_TABLES, self._tables), (_SETTINGS, settings)):
            with atomic_write(Path(folder) / name) as file:
                file.write(data)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, first: bool = True
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any text that is valid Unicode; lone surrogates are refused with ParameterError.
            add_special: put the beginning-of-text and end-of-text tokens around it where the model wants them.
            parse_special: the texts of special tokens become these tokens. Only for text you trust.
            first: the text begins its document; False for what continues one (some vocabularies put a space in front
                of a document only).
        """
        check_text(text)
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        hidden = () if parse_special else self.special_ids
        for index, part in enumerate(self._finder("raw").split(text, hidden)):
            if isinstance(part, int):
                ids.append(part)
            else:
                self._encode_between(part, hidden, first and index == 0, ids)
        if add_special and self.add_eos and self._eos_id is not None:
            ids.append(self._eos_id)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cut a trusted text at its special tokens: ids of these and, between them, ordinary text that is not empty."""
        return self._finder("all").split(text, self._ordinary_literals)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, after: int | None = None) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. See `decode_bytes`."""
        return self.decode_bytes(ids, skip_special=skip_special, after=after).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False, after: int | None = None) -> bytes:
        """The exact bytes of ids.

        Args:
            ids: each in [0, vocab_size); ParameterError otherwise.
            skip_special: leave special tokens out.
            after: the id that came before the first; None for the beginning of a text, where the space that a
                vocabulary puts there is taken away again.
        """
        parts = []
        for token in ids:
            piece = self.piece(token, after)
            if not skip_special or token not in self.special_ids:
                parts.append(piece)
            after = token
        return b"".join(parts)

    def piece(self, token: int, after: int | None = None) -> bytes:
        """The bytes of one token that follows the token `after` (None: it begins the text)."""
        piece = self._pieces.get(token) if type(token) is int else None
        if piece is None:
            if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= token < self.vocab_size:
                raise ParameterError(f"token id {token!r} is outside the vocabulary [0, {self.vocab_size - 1}]")
            piece = self._pieces[int(token)] = self._bpe.piece(int(token))
        if piece[:1] == b" " and self.drops_space(after):
            return piece if token in self._own_space else piece[1:]
        return piece

    def drops_space(self, after: int | None) -> bool:
        """Whether a token that follows `after` (None: it begins the text) loses the space it begins with."""
        return bool(self._prefix) and (after is None or after in self._spaced_after)

    def token_text(self, token: int) -> str:
        """The text of one token by itself, U+FFFD for bytes that are no UTF-8."""
        return self.piece(token, token).decode("utf-8", "replace")

    def special_texts(self) -> tuple[str, ...]:
        """The texts of the special tokens."""
        return self._special_texts

    def end_texts(self) -> tuple[str, str]:
        """The texts of the tokens that begin and end a text, empty where there is none: what templates are given."""
        bos, eos = (
            "" if token is None else self._texts.get(token) or self.token_text(token)
            for token in (self.bos_id, self._eos_id)
        )
        return bos, eos

    def _finder(self, kind: str) -> LiteralFinder:
        """Of the literals looked for in "raw" text, in "normalized" text, or of "all" by their own text."""
        finder = self._finders.get(kind)
        if finder is None:
            wanted = [entry for entry in self._literals if kind == "all" or entry.normalized == (kind == "normalized")]
            if kind == "normalized":
                wanted = [entry._replace(text=self._steps.normalized(entry.text)) for entry in wanted]
            finder = self._finders[kind] = LiteralFinder(wanted)
        return finder

    def _encode_between(self, text: str, hidden: Container[int], first: bool, ids: list[int]) -> None:
        encode_word = self._bpe.encode_word
        for index, part in enumerate(self._finder("normalized").split(self._steps.normalized(text), hidden)):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self._steps.words(part, first and index == 0):
                    ids += encode_word(word)


def check_text(text: str, name: str = "text") -> None:
    """Refuse what is no string of valid Unicode, naming it."""
    if not isinstance(text, str):
        raise ParameterError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(
            f"{name} has a lone surrogate U+{ord(text[error.start]):04X} at {error.start}; it is no valid Unicode"
        ) from None


def _checksum(settings: Mapping[str, Any], tables: bytes | memoryview) -> int:
    """Of the tables and of the settings but this number itself."""
    plain = {key: value for key, value in settings.items() if key != "crc32"}
    return zlib.crc32(tables, zlib.crc32(json.dumps(plain, sort_keys=True).encode()))
