"""Everything of one sequence that a draw depends on beside its logits: what is out already, and a place in a grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvik.decoding.edits import Edits
from kvik.decoding.history import Bank, Break, Breakers, Endings, Repeats, Tokens
from kvik.decoding.penalties import dry_cap, dry_penalty
from kvik.errors import ParameterError
from kvik.params import AnyParams, SamplingParams

__all__ = ["DecodingState", "Edits", "Matcher", "Words"]

Ids = npt.NDArray[np.int32]
UNBOUNDED = 2**31 - 1
NO_BREAKERS = Breakers(())


class Matcher(Protocol):
    """A grammar at a place in its text. A snapshot is the number of tokens accepted; `restore` goes back to it."""

    def mask(self) -> npt.NDArray[np.uint32] | None:
        """The tokens that may follow, [ceil(V / 32)]: bit t % 32 of word t // 32; None: all.

        End-of-text is allowed exactly where the text may end.
        """
        ...

    def accept(self, token: int) -> None: ...
    def snapshot(self) -> int: ...
    def restore(self, snapshot: int) -> None: ...
    def fork(self) -> Matcher: ...

    @property
    def stopped(self) -> bool:
        """Whether nothing but end-of-text can follow."""
        ...


class Words(NamedTuple):
    """bad_words and dry_breakers as the model's tokens: sequences of ids, none empty (kvik.text.words finds them)."""

    bad: tuple[tuple[int, ...], ...] = ()
    breakers: Breakers = NO_BREAKERS


NO_WORDS = Words()


class DecodingState:
    """One for each sequence or beam. `accept` tells it each token that is out, `edits` is what the next draw needs.

    Args:
        params: the request's.
        prompt: its token ids.
        vocab_size: V.
        end_ids: tokens banned, beside params.stop_token_ids, until min_tokens are out.
        words: of params.bad_words and params.dry_breakers.
        matcher: the grammar at its beginning; the state owns it.
    """

    def __init__(
        self,
        params: AnyParams,
        prompt: Sequence[int],
        vocab_size: int,
        *,
        end_ids: Iterable[int] = (),
        words: Words = NO_WORDS,
        matcher: Matcher | None = None,
    ) -> None:
        self.matcher = matcher
        self.num_accepted = 0
        self._min_tokens = params.min_tokens
        self._repetition, self._ngram = params.repetition_penalty, params.no_repeat_ngram_size
        self._presence = self._frequency = self._multiplier = 0.0
        self._bias: dict[str, Any] = {}
        if isinstance(params, SamplingParams):
            self._take_sampling(params)
        self._bad = Endings(words.bad)
        ends = {*end_ids, *params.stop_token_ids}
        # what is banned once min_tokens are out, and before
        self._fixed = tuple(_ids(sorted(ids)) if ids else None for ids in (self._bad.alone, ends | self._bad.alone))
        self._check(vocab_size, ends, words)
        self._seen = Bank(prompt) if self._repetition != 1.0 or self._ngram == 1 else None
        self._counted = Bank() if self._presence or self._frequency else None
        self._breakers = words.breakers if self._multiplier else None
        repeats = bool(self._multiplier) or self._ngram > 1
        looks_back = repeats or self._bad.long or self._seen is not None or self._counted is not None
        self._tokens = Tokens(prompt) if looks_back else None
        self._repeats: Repeats | None = None
        self._break = Break()
        if self._tokens is not None and repeats:
            self._longest = max(self._ngram - 1, self._longest_dry())
            self._repeats = Repeats(self._tokens.ids, self._longest)
            self._find_break()
        self._static = self._tokens is None and matcher is None

    def _take_sampling(self, params: SamplingParams) -> None:
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._multiplier, self._base = params.dry_multiplier, params.dry_base
        self._allowed, self._range = params.dry_allowed_length, params.dry_range
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            self._bias = {"bias_ids": _ids(ids), "biases": np.array(biases, np.float32)}

    def _check(self, vocab_size: int, ends: set[int], words: Words) -> None:
        bias = self._bias["bias_ids"].tolist() if self._bias else ()
        bad = {token for sequence in words.bad for token in sequence}
        for name, ids in (("logit_bias", bias), ("end-of-text and stop token ids", ends), ("bad_words", bad)):
            outside = sorted(token for token in ids if not 0 <= token < vocab_size)
            if outside:
                listed = ", ".join(map(str, outside))
                raise ParameterError(f"{name} must be in [0, {vocab_size - 1}], got {listed}")

    def _longest_dry(self) -> int:
        """A repetition of more tokens costs no more."""
        if not self._multiplier:
            return 0
        cap = dry_cap(self._base)
        return UNBOUNDED if cap is None else self._allowed + cap

    # ---- tokens

    def accept(self, token: int) -> None:
        """A token of the answer is out."""
        self.num_accepted += 1
        if self._static:
            return
        if self.matcher is not None:
            self.matcher.accept(token)
        if self._tokens is None:
            return
        self._tokens.add(token)
        if self._seen is not None:
            self._seen.add(token)
        if self._counted is not None:
            self._counted.add(token)
        if self._repeats is not None:
            self._repeats.add(self._tokens.ids)
            if self._breakers is not None:
                self._break = self._breakers.after(self._tokens.ids, self._break)

    def snapshot(self) -> int:
        """The number of tokens accepted, for `restore`."""
        return self.num_accepted

    def restore(self, snapshot: int) -> None:
        """Go back to when so many tokens were accepted."""
        back = self.num_accepted - snapshot
        if not 0 <= snapshot <= self.num_accepted:
            raise ParameterError(f"snapshot must be in [0, {self.num_accepted}], got {snapshot}")
        if not back:
            return
        self.num_accepted = snapshot
        if self.matcher is not None:
            self.matcher.restore(self.matcher.snapshot() - back)
        if self._tokens is None:
            return
        for token in self._tokens.ids[: -back - 1 : -1].tolist():
            if self._seen is not None:
                self._seen.take_back(token)
            if self._counted is not None:
                self._counted.take_back(token)
        self._tokens.drop(back)
        if self._repeats is not None:
            self._repeats.restart(self._tokens.ids)
            self._find_break()

    def fork(self) -> DecodingState:
        """Another one at the same place, which goes its own way."""
        other = DecodingState.__new__(DecodingState)
        other.__dict__.update(self.__dict__)
        other.matcher = None if self.matcher is None else self.matcher.fork()
        other._tokens = None if self._tokens is None else self._tokens.copy()
        other._seen = None if self._seen is None else self._seen.copy()
        other._counted = None if self._counted is None else self._counted.copy()
        other._repeats = None if self._repeats is None else self._repeats.copy()
        return other

    def _find_break(self) -> None:
        if self._breakers is not None and self._tokens is not None:
            self._break = self._breakers.find(self._tokens.ids)

    @property
    def complete(self) -> bool:
        """Whether the text is one of the grammar that nothing can follow, and long enough."""
        return self.matcher is not None and self.num_accepted >= self._min_tokens and self.matcher.stopped

    # ---- edits

    def edits(self) -> Edits | None:
        """What is to be done to the next token's logits; None where that is nothing."""
        banned = self._fixed[self.num_accepted < self._min_tokens]
        if self._static:
            return Edits(**self._bias, banned=banned) if self._bias or banned is not None else None
        parts: dict[str, Any] = dict(self._bias)
        if self._tokens is not None and (ready := self._bad.ready(self._tokens.ids)):
            banned = _ids(ready) if banned is None else np.union1d(banned, _ids(ready))
        if banned is not None:
            parts["banned"] = banned
        if self.matcher is not None:
            parts["mask"] = self.matcher.mask()
        if self._seen is not None and self._repetition != 1.0:
            parts |= {"seen": self._seen.ids, "repetition": self._repetition}
        if self._counted is not None and self._counted.ids.size:
            parts |= {"counted": self._counted.ids, "counts": self._counted.counts}
            parts |= {"presence": self._presence, "frequency": self._frequency}
        if self._multiplier:
            parts |= self._dry()
        if self._ngram:
            parts["repeated"] = self._repeated()
        return Edits(**parts) if parts else None

    def _repeated(self) -> Ids | None:
        """Tokens that would complete an n-gram again."""
        if self._ngram == 1:
            assert self._seen is not None
            return self._seen.ids if self._seen.ids.size else None
        assert self._repeats is not None and self._tokens is not None
        places = self._repeats.places[self._repeats.lengths >= self._ngram - 1]
        return _ids(set(self._tokens.ids[places + 1].tolist())) if len(places) else None

    def _dry(self) -> dict[str, Any]:
        """llama.cpp's: of each token, the longest repetition it would lengthen, in range and after the last breaker."""
        assert self._repeats is not None and self._tokens is not None
        size = self._tokens.size
        start = max(0, size - self._range) if self._range else 0
        places, lengths = self._repeats.places, self._repeats.lengths
        if size - start <= self._allowed or not len(places):
            return {}
        limit = size - self._break.end if self._break.begin >= start else size - start
        if start:
            lengths = np.minimum(lengths, places - start + 1)
        if limit < self._longest:
            lengths = np.minimum(lengths, limit)
        known = np.flatnonzero(lengths >= self._allowed)
        if not len(known):
            return {}
        longest = _longest_of(self._tokens.ids[places[known] + 1], lengths[known])
        penalties = dry_penalty(np.fromiter(longest.values(), np.int64), self._multiplier, self._base, self._allowed)
        return {"dry_ids": _ids(longest), "dry_penalties": penalties}


def _longest_of(ids: Ids, lengths: npt.NDArray[np.int64]) -> dict[int, int]:
    """Of each id, its largest length."""
    order = np.argsort(lengths)
    return dict(zip(ids[order].tolist(), lengths[order].tolist(), strict=True))


def _ids(tokens: Iterable[int]) -> Ids:
    return np.fromiter(tokens, np.int32)
