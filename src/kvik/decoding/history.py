"""What a sequence's tokens say about its next one: which it has, how often, and what would repeat what was there.

Each part takes a token at a time and can take the last ones back. None does work that grows with the length except in
numpy; a fork shares nothing that changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Bank", "Break", "Breakers", "Endings", "Repeats", "Tokens"]

Ids = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]
NOWHERE: Lengths = np.empty(0, np.int64)


class Tokens:
    """The tokens so far, as an array that grows at its end: `ids` is a view of them."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        given = np.fromiter(ids, np.int32)
        self.size = len(given)
        self._room = np.empty(max(64, 2 * self.size), np.int32)
        self._room[: self.size] = given

    @property
    def ids(self) -> Ids:
        return self._room[: self.size]

    def add(self, token: int) -> None:
        if self.size == len(self._room):
            self._room = np.concatenate([self._room, np.empty_like(self._room)])
        self._room[self.size] = token
        self.size += 1

    def drop(self, count: int) -> None:
        self.size -= count

    def copy(self) -> Tokens:
        other = Tokens()
        other.size, other._room = self.size, self._room.copy()
        return other


class Bank:
    """Distinct tokens in order of their first coming, and how often each came, `prompt` uncounted.

    prompt: tokens that are there from the beginning and stay.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._fixed = frozenset(prompt)
        self._ids = Tokens(sorted(self._fixed))
        self._counts = Tokens([0] * self._ids.size)
        self._place: dict[int, int] = {}  # of tokens that came since

    @property
    def ids(self) -> Ids:
        return self._ids.ids

    @property
    def counts(self) -> Ids:
        return self._counts.ids

    def add(self, token: int) -> None:
        if token in self._fixed:
            return
        place = self._place.get(token)
        if place is None:
            self._place[token] = self._ids.size
            self._ids.add(token)
            self._counts.add(1)
        else:
            self._counts.ids[place] += 1

    def take_back(self, token: int) -> None:
        """The last token that was added. What came first only with it is the last of the list."""
        if token in self._fixed:
            return
        place = self._place[token]
        self._counts.ids[place] -= 1
        if not self._counts.ids[place]:
            del self._place[token]
            self._ids.drop(1)
            self._counts.drop(1)

    def copy(self) -> Bank:
        other = Bank()
        other._fixed, other._place = self._fixed, dict(self._place)
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other


class Endings:
    """Of sequences of tokens, the last one of each whose others are the end of the text.

    sequences: none empty. `alone`: those of one token, which are always ready. `long`: whether there are others.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.alone = {s[0] for s in sequences if len(s) == 1}
        self._after: dict[int, list[tuple[Ids, int]]] = {}
        for sequence in sorted({tuple(s) for s in sequences if len(s) > 1}):
            before = np.array(sequence[:-1], np.int32)
            self._after.setdefault(sequence[-2], []).append((before, sequence[-1]))
        self.long = bool(self._after)

    def ready(self, ids: Ids) -> list[int]:
        """Last tokens of the longer sequences that `ids` [N] have come up to."""
        if not len(ids) or not self._after:
            return []
        near = self._after.get(int(ids[-1]), ())
        return [last for before, last in near if len(before) <= len(ids) and (ids[-len(before) :] == before).all()]


class Break(NamedTuple):
    """A breaker is ids[begin:end]; the default is none."""

    begin: int = -1
    end: int = 0


class Breakers:
    """Finds the last sequence that no repetition reaches across.

    sequences: none empty. Of those that overlap, the one that begins last counts, and the longest of these: so llama.cpp
    looks for them, backwards.
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self._known = frozenset(map(tuple, sequences))
        lengths: dict[int, set[int]] = {}  # by last token
        for sequence in self._known:
            lengths.setdefault(sequence[-1], set()).add(len(sequence))
        self._ending = {last: sorted(found) for last, found in lengths.items()}

    def after(self, ids: Ids, known: Break) -> Break:
        """Of ids [N], by that of ids[:-1]."""
        for length in self._ending.get(int(ids[-1]), ()):
            at = len(ids) - length
            if at < max(known.begin, 0):
                break
            if tuple(ids[at:].tolist()) in self._known:
                return Break(at, len(ids))
        return known

    def find(self, ids: Ids) -> Break:
        """Of ids [N], from nothing: backwards, to where none can begin later."""
        found = Break()
        for end, token in zip(range(len(ids), 0, -1), ids[::-1].tolist(), strict=True):
            if end <= found.begin + 1:
                break
            if token in self._ending:
                begun = self.after(ids[:end], Break(found.begin + 1))
                found = begun if begun.end else found
        return found


class Repeats:
    """Where the end of the text was before: places i < N - 1 whose tokens up to i match those up to N - 1.

    places [M], ascending; lengths [M] >= 1 of the matches, at most `most`. A match may overlap the end itself.
    """

    def __init__(self, ids: Ids, most: int) -> None:
        self.most = most
        self.places, self.lengths = _repeats(ids, most)

    def add(self, ids: Ids) -> None:
        """ids [N] are those known before and one more."""
        places = np.flatnonzero(ids[:-1] == ids[-1])
        lengths = np.ones(len(places), np.int64)
        if len(places) and len(self.places):
            # a match that ended just before goes on; the one of the end with itself is none
            at = np.searchsorted(self.places, places - 1)
            at[at == len(self.places)] = 0
            goes_on = self.places[at] == places - 1
            lengths[goes_on] += self.lengths[at[goes_on]]
            np.minimum(lengths, self.most, out=lengths)
        self.places, self.lengths = places, lengths

    def restart(self, ids: Ids) -> None:
        """After tokens were taken back."""
        self.places, self.lengths = _repeats(ids, self.most)

    def copy(self) -> Repeats:
        other = Repeats(np.empty(0, np.int32), self.most)
        other.places, other.lengths = self.places, self.lengths
        return other


def _repeats(ids: Ids, most: int) -> tuple[Lengths, Lengths]:
    """Places and lengths as `Repeats` has them, from nothing.

    The Z-function of the reversed ids (Gusfield 1997, Algorithms on Strings, Trees and Sequences, 1.3), at the places
    where it is not 0: steps grow with their number and the text's length, whatever it repeats.
    """
    size = len(ids)
    if size < 2:
        return NOWHERE, NOWHERE
    places = np.flatnonzero(ids[:-1] == ids[-1])
    text = np.ascontiguousarray(ids[::-1]).data
    lengths = [0] * size  # of text[at:], which begins as text does
    begin = end = 0  # text[begin:end] is the beginning of text, with the largest end so far
    for at in (size - 1 - places[::-1]).tolist():
        if at < end and lengths[at - begin] < end - at:
            lengths[at] = lengths[at - begin]
            continue
        begin, end = at, max(at, end)
        while end < size and text[end] == text[end - at]:
            end += 1
        lengths[at] = end - at
    found = [lengths[at] for at in (size - 1 - places).tolist()]
    return places, np.minimum(np.array(found, np.int64), most)
