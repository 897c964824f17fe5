"""Windows over a text's tokens, in which every token is predicted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.evaluation.model import TextTokens
from kvik.evaluation.token_stream import Tokens, token_stream

__all__ = ["DEFAULT_WINDOW", "Size", "Window", "text_windows", "token_windows", "window_size"]

DEFAULT_WINDOW = 2048


class Size(NamedTuple):
    """window: most tokens of one, what begins a text included. stride: tokens newly predicted by each after the first."""

    window: int
    stride: int


class Window(NamedTuple):
    """What is scored at once.

    ids: with the token in front that the model's texts begin with. first: index of the first token that is predicted here;
    those before it are context. start: bytes of the text before that token. sizes [N - first]: bytes of the predicted.
    """

    ids: list[int]
    first: int
    start: int
    sizes: NDArray[np.int64]


def window_size(window: int | None, stride: int | None, context: int) -> Size:
    """The size asked for: None is 2,048 tokens, or the model's context where that is less, and a stride of all but one.

    Raises ParameterError for a window outside [2, context] and a stride outside [1, window - 1].
    """
    if window is None:
        window = min(DEFAULT_WINDOW, context)
    if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= context:
        raise ParameterError(f"window must be an integer in [2, {context}], the model's context, got {window!r}")
    if stride is None:
        stride = window - 1
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < window:
        raise ParameterError(f"stride must be an integer in [1, {window - 1}], below the window, got {stride!r}")
    return Size(window, stride)


def text_windows(tokenizer: TextTokens, pieces: Iterable[str], size: Size) -> Iterator[Window]:
    """The windows of one text that comes in pieces, begun as the model's texts are."""
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    return token_windows(token_stream(tokenizer, pieces), size, bos)


def token_windows(tokens: Iterable[Tokens], size: Size, bos: int | None) -> Iterator[Window]:
    """The windows of one text, as its tokens come: the k-th begins with token k * stride, with `bos` in front of it.

    Every token is predicted by one window, except the text's first where nothing is in front of it. What is held is a
    window and one of the items of `tokens`.
    """
    front = [] if bos is None else [bos]
    room = size.window - len(front)
    ids: list[int] = []
    sizes: list[int] = []
    old = start = 0  # of what is held: tokens that are context only, and the bytes before all of it

    def window(at: int, count: int) -> Iterator[Window]:
        new = old if front else max(1, old)
        if new < count:
            end = at + count
            before = start + sum(sizes[at : at + new])
            yield Window(front + ids[at:end], len(front) + new, before, np.array(sizes[at + new : end], np.int64))

    for part in tokens:
        ids += part.ids
        sizes += part.sizes
        at = 0
        while len(ids) - at >= room:
            yield from window(at, room)
            start += sum(sizes[at : at + size.stride])
            at, old = at + size.stride, room - size.stride
        del ids[:at], sizes[:at]
    yield from window(0, len(ids))
