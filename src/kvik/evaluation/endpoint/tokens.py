"""A server's tokenizer, asked over /tokenize in the shapes of Kvik's server, vLLM's and llama-server's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvik.errors import DataError, ParameterError
from kvik.evaluation.endpoint.transport import Refused, Transport
from kvik.text.tokenizer import check_text
from kvik.text.vocabulary import BYTE_ALPHABET

__all__ = ["ServerTokenizer", "token_bytes"]

_PATH = "/tokenize"
_REMEDY = "give tokenizer="
_PROBE = "a"
_ESCAPED = "bytes:"
_REPLACEMENT = "\ufffd"

Piece = str | bytes | None


class _Tokens(NamedTuple):
    """ids: of a text. pieces: what the server says each is; empty where it does not say."""

    ids: list[int]
    pieces: list[Piece]


class _Around(NamedTuple):
    """What the server puts around a text's ids, and whether it puts a space in front of the text."""

    front: list[int]
    back: list[int]
    spaced: bool


class ServerTokenizer:
    """The tokens of the model behind a server, one request a text. Safe to share between threads.

    A token's bytes are learnt as texts with it are encoded, and only where they add up to the text.

    Args:
        transport: to the server.
        model: its name there.
        token_name: what an echo calls a token, where the server says that; see `token_bytes`.
    """

    def __init__(self, transport: Transport, model: str, token_name: Callable[[int], str]) -> None:
        self._transport, self._model, self._token_name = transport, model, token_name
        self._lock = threading.RLock()
        self._ask: Callable[[str, bool], _Tokens] | None = None
        self._around: _Around | None = None
        self._pieces: dict[int, bytes] = {}

    @property
    def add_bos(self) -> bool:
        """Whether the model's texts begin with a token of their own."""
        return bool(self._known_around().front)

    @property
    def bos_id(self) -> int | None:
        """That token, if there is one."""
        front = self._known_around().front
        return front[0] if front else None

    def encode(self, text: str, *, add_special: bool = True, first: bool = True) -> list[int]:
        """The ids of a text. first: it begins its document; where that makes a difference, False is refused."""
        check_text(text)
        around = self._known_around()
        if not first and around.spaced:
            raise ParameterError(
                f"{self._transport.url}: its tokenizer puts a space in front of a text, also of one that goes on; {_REMEDY}"
            )
        ids = self._encode(text, around.spaced) if text else []
        return [*around.front, *ids, *around.back] if add_special else ids

    def piece(self, token: int, after: int | None = None) -> bytes:
        """The bytes of a token in a text that was encoded here. ParameterError for one whose bytes the server hides."""
        around = self._known_around()
        if token in around.front or token in around.back:
            return b""
        piece = self._pieces.get(token)
        if piece is None:
            raise ParameterError(f"{self._transport.url}: the bytes of token {token} are not known; {_REMEDY}")
        begins = after is None or after in around.front
        return piece[1:] if around.spaced and begins and piece[:1] == b" " else piece

    def known(self, token: int) -> bytes | None:
        """A token's bytes in the middle of a text, if they are known."""
        return self._pieces.get(token)

    def _known_around(self) -> _Around:
        with self._lock:
            if self._around is None:
                self._ask = self._shape()
                inner, outer = self._ask(_PROBE, False), self._ask(_PROBE, True)
                at = _find(inner.ids, outer.ids)
                if at is None or at > 1:
                    message = f"what its /tokenize puts around {_PROBE!r} is not understood: {outer.ids}; {_REMEDY}"
                    raise DataError(f"{self._transport.url}: {message}")
                spaced = any(_joined(read, inner.pieces) == b" " + _PROBE.encode() for read in _READINGS)
                self._around = _Around(outer.ids[:at], outer.ids[at + len(inner.ids) :], spaced)
            return self._around

    def _encode(self, text: str, spaced: bool) -> list[int]:
        assert self._ask is not None
        found = self._ask(text, False)
        if any(token not in self._pieces for token in found.ids):
            self._learn(found, text.encode(), spaced)
        return found.ids

    def _learn(self, found: _Tokens, data: bytes, spaced: bool) -> None:
        """Keep the bytes of tokens, if one reading of what the server says of them gives the text."""
        for read in (*_READINGS, self._echoed):
            pieces = [read(token, piece) for token, piece in zip(found.ids, found.pieces, strict=bool(found.pieces))]
            known = [piece for piece in pieces if piece is not None]
            if len(known) == len(found.ids) and b"".join(known) in (data, b" " + data if spaced else data):
                self._pieces.update(zip(found.ids, known, strict=True))
                return

    def _echoed(self, token: int, piece: Piece) -> bytes | None:
        """A token whose text is no whole UTF-8: what an echo calls it says its bytes."""
        if token in self._pieces:
            return self._pieces[token]
        if isinstance(piece, str) and _REPLACEMENT in piece:
            return token_bytes(self._token_name(token))
        return _plain(token, piece)

    def _shape(self) -> Callable[[str, bool], _Tokens]:
        """How this server wants to be asked. ParameterError where it has no tokenizer."""
        try:
            if "count" in self._object(self._prompt_body(_PROBE, False)):
                return self._by_prompt
        except Refused as error:
            if error.status not in (400, 422):
                raise ParameterError(f"{error}; its tokens cannot be asked for: {_REMEDY}") from None
        return self._by_content

    def _prompt_body(self, text: str, special: bool) -> dict[str, Any]:
        return {"model": self._model, "prompt": text, "add_special_tokens": special, "return_token_strs": True}

    def _by_prompt(self, text: str, special: bool) -> _Tokens:
        """As Kvik and vLLM answer."""
        value = self._object(self._prompt_body(text, special))
        ids = [self._id(token) for token in self._list(value, "tokens")]
        texts = value.get("token_strs") or []
        if not isinstance(texts, list) or len(texts) not in (0, len(ids)):
            raise DataError(f"{self._transport.url}{_PATH}: token_strs are not as many as tokens")
        return _Tokens(ids, [piece if isinstance(piece, str) else None for piece in texts])

    def _by_content(self, text: str, special: bool) -> _Tokens:
        """As llama-server answers; there a piece that is no UTF-8 is a list of bytes."""
        body = {"content": text, "add_special": special, "parse_special": False, "with_pieces": True}
        ids: list[int] = []
        pieces: list[Piece] = []
        for entry in self._list(self._object(body), "tokens"):
            given = entry if isinstance(entry, Mapping) else {"id": entry}
            ids.append(self._id(given.get("id")))
            piece = given.get("piece")
            if isinstance(piece, list) and all(isinstance(b, int) and 0 <= b < 256 for b in piece):
                piece = bytes(piece)
            pieces.append(piece if isinstance(piece, str | bytes) else None)
        return _Tokens(ids, pieces)

    def _object(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        value = self._transport.post(_PATH, body)
        if not isinstance(value, Mapping):
            raise DataError(f"{self._transport.url}{_PATH}: the answer is no object")
        return value

    def _list(self, value: Mapping[str, Any], name: str) -> list[Any]:
        found = value.get(name)
        if not isinstance(found, list):
            raise DataError(f"{self._transport.url}{_PATH}: the answer has no list {name!r}")
        return found

    def _id(self, token: Any) -> int:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise DataError(f"{self._transport.url}{_PATH}: {token!r:.80} is no token id")
        return token


def _find(inner: Sequence[int], outer: Sequence[int]) -> int | None:
    """Where the one stands in the other."""
    places = range(len(outer) - len(inner) + 1)
    return next((at for at in places if list(outer[at : at + len(inner)]) == list(inner)), None)


def _plain(token: int, piece: Piece) -> bytes | None:
    """The text of a token."""
    return piece.encode() if isinstance(piece, str) and _REPLACEMENT not in piece else piece if isinstance(piece, bytes) else None


def _alphabet(token: int, piece: Piece) -> bytes | None:
    """A byte-level vocabulary's own spelling (Radford et al. 2019)."""
    if not isinstance(piece, str) or any(char not in BYTE_ALPHABET for char in piece):
        return None
    return bytes(BYTE_ALPHABET[char] for char in piece)


def _sentence_piece(token: int, piece: Piece) -> bytes | None:
    """SentencePiece's own spelling: U+2581 for a space, <0x0A> for a byte."""
    if not isinstance(piece, str):
        return None
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    return piece.replace("\u2581", " ").encode()


_READINGS: tuple[Callable[[int, Piece], bytes | None], ...] = (_plain, _alphabet, _sentence_piece)


def _joined(read: Callable[[int, Piece], bytes | None], pieces: Sequence[Piece]) -> bytes:
    return b"".join(read(-1, piece) or b"" for piece in pieces)


def token_bytes(name: str) -> bytes | None:
    r"""The bytes of a token from its name in an echo, where OpenAI's `bytes:\xf0\x9f` says them; else of its text.

    None for a text with U+FFFD, which does not say them.
    """
    if name.startswith(_ESCAPED):
        parts = name.removeprefix(_ESCAPED).split("\\x")
        try:
            return bytes(int(part, 16) for part in parts[1:]) if not parts[0] and len(parts) > 1 else None
        except ValueError:
            return None
    return None if _REPLACEMENT in name else name.encode()
