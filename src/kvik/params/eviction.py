"""Eviction policies: which tokens a KV cache keeps.

A policy is `StreamingLLM`, which is a mask, or one of the *scorers*, which rank the slots of each layer and KV head at
*events* and keep a budget of them. What carries scorers out is kvik.cache.eviction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, NamedTuple

from kvik.errors import ParameterError
from kvik.params.checks import above, choose, integer, real

__all__ = [
    "H2O", "POLICIES", "TOVA", "ExpectedAttention", "KeyDiff", "Policy", "Protected", "Scorer", "SnapKV", "StreamingLLM",
    "parse_policy", "policy_name", "policy_of", "policy_text",
]  # fmt: skip

MAX_TOKENS = 2**30
MAX_SINKS = 1024
MAX_KERNEL = 255
MAX_FUTURE = 65536
MAX_QUERIES = 4096


@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """The first tokens and the last ones, positions counted within the cache (Xiao et al. 2023, arXiv:2309.17453).

    sinks: first tokens that every row sees, 1 to 1,024. window: last tokens that a row sees, its own included, at least 1.
    """

    sinks: int = 4
    window: int = 2044

    def __post_init__(self) -> None:
        integer("sinks", self.sinks, 1, MAX_SINKS)
        integer("window", self.window, 1, MAX_TOKENS)

    def check(self, prompt_tokens: int | None) -> None:
        """Any prompt will do."""


class Protected(NamedTuple):
    """First and last slots of a table that are kept whatever their score."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What all policies have that rank slots and keep the best.

    Attributes:
        budget: slots that each layer and KV head keeps at an event, on average: an integer is tokens, at least 1; a float
            is a share of all tokens so far (evicted ones counted), in (0, 1], rounded down, but at least one token.
        at: tokens before the first event, at least 1; None: the prompt's length.
        every: further events each so many tokens, 0 to 2**30; 0: the first is the only one. An event at which nothing
            would go, because the cache holds no more than the budget, is passed over.
    """

    budget: int | float = 0.25
    at: int | None = None
    every: int = 0
    is_share: bool = field(init=False, repr=False)  # one token and all of them, 1 and 1.0, are not equal

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_share", isinstance(self.budget, float))
        if self.is_share:
            above("budget (a share of the tokens)", self.budget, 0.0, 1.0)
            object.__setattr__(self, "budget", float(self.budget))
        else:
            integer("budget", self.budget, 1, MAX_TOKENS)
        if self.at is not None:
            integer("at", self.at, 1, MAX_TOKENS)
        integer("every", self.every, 0, MAX_TOKENS)

    def kept(self, seen: int) -> int:
        """The budget at an event after `seen` tokens, at least 1; slots that are kept, where there are so many."""
        return max(1, int(_exactly(self.budget) * seen)) if self.is_share else int(self.budget)

    def protected(self, kept: int) -> Protected:
        """Of the kept slots those that are kept whatever their score."""
        return Protected(0, 0)

    def event(self, prompt_tokens: int | None, start: int, evicted: Fraction | int = 0) -> int | None:
        """The first event at or after `start` tokens at which slots go, where `evicted` went before (mean of all tables).

        Events are at `at`, or the prompt's length, and then every `every` tokens; without a prompt (None) and `at`, at the
        multiples of `every`. None: there is none.
        """
        first = self.at or prompt_tokens or self.every
        if not self.is_share:
            over = evicted + Fraction(self.budget)
        elif self.budget < 1.0:
            over = max(evicted / (1 - _exactly(self.budget)), Fraction(evicted + 1))
        else:
            return None
        start = max(start, int(over) + 1)  # the table holds more than the budget: tokens - evicted > kept(tokens)
        if first and start <= first:
            return first
        return first + -(-(start - first) // self.every) * self.every if self.every else None

    def check(self, prompt_tokens: int | None) -> None:
        """ParameterError where a prompt of so many tokens (None: no prompt, a text that is scored) leaves the policy without
        sense: nothing to evict ever, or a budget below what is always kept."""
        first = self.at or prompt_tokens
        if self.every == 0 and first is None:
            raise ParameterError(
                f"{policy_name(self)} evicts at the prompt's length, and a text has none: give at or every"
            )
        if not self.is_share and self.every == 0 and first is not None and self.budget > first:
            where = "the prompt's" if self.at is None else "at, which is"
            raise ParameterError(
                f"budget {self.budget} is above {where} {first} tokens, so that nothing would be evicted"
            )
        event = self.event(prompt_tokens, 0)
        if event is not None:
            self._check_protected(event)

    def _check_protected(self, tokens: int | None = None) -> None:
        """At an event after so many tokens; None: at any, for a budget in tokens."""
        kept = self.kept(tokens or 0)
        if (least := sum(self.protected(kept))) > kept:
            keeps = "" if tokens is None else f" keeps {kept} of {tokens} tokens and"
            raise ParameterError(
                f"budget {_budget_text(self.budget)}{keeps} is below the {least} that {policy_name(self)} always keeps "
                f"({self._always})"
            )

    @property
    def _always(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class H2O(Scorer):
    """Heavy hitters: most attention from all rows so far, by KV head, and the last slots (Zhang et al. 2023, arXiv:2306.14048).

    recent: share of the budget that goes to the last slots, in [0, 1].
    """

    recent: float = 0.5
    every: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        real("recent", self.recent, 0.0, 1.0)
        object.__setattr__(self, "recent", float(self.recent))

    def protected(self, kept: int) -> Protected:
        return Protected(0, int(_exactly(self.recent) * kept))


@dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """Most attention from the last rows, pooled over neighbours; these rows' slots are kept (Li et al. 2024, arXiv:2404.14469).

    window: rows, 1 to 4,096. kernel: slots of which the largest sum counts, odd, 1 to 255; 1: no pooling.
    """

    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("window", self.window, 1, MAX_QUERIES)
        integer("kernel", self.kernel, 1, MAX_KERNEL)
        if self.kernel % 2 == 0:
            raise ParameterError(f"kernel must be odd, got {self.kernel}")
        if 0 < self.every < self.window:
            raise ParameterError(f"every must be 0 or at least window ({self.window}), got {self.every}")
        if not self.is_share:
            self._check_protected()

    def protected(self, kept: int) -> Protected:
        return Protected(0, self.window)

    @property
    def _always(self) -> str:
        return f"window={self.window}"


@dataclass(frozen=True, kw_only=True)
class TOVA(Scorer):
    """Most attention from the last row, averaged over a layer's heads, which keep the same (Oren et al. 2024, arXiv:2401.06104)."""

    every: int = 64


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Scorer):
    """Keys least like the mean key, by KV head; no attention needed (Park et al. 2025, arXiv:2504.15364)."""

    every: int = 64


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """Most attention expected from rows to come, times the value's length (Devoto et al. 2025, arXiv:2510.00636).

    window: last rows from whose queries those to come are foreseen, 2 to 4,096. future: positions that are foreseen,
    1 to 65,536. sinks: first slots that are always kept, 0 to 1,024.
    """

    window: int = 256
    future: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("window", self.window, 2, MAX_QUERIES)
        integer("future", self.future, 1, MAX_FUTURE)
        integer("sinks", self.sinks, 0, MAX_SINKS)
        if not self.is_share:
            self._check_protected()

    def protected(self, kept: int) -> Protected:
        return Protected(self.sinks, 0)

    @property
    def _always(self) -> str:
        return f"sinks={self.sinks}"


Policy = StreamingLLM | H2O | SnapKV | TOVA | KeyDiff | ExpectedAttention
POLICIES: dict[str, type[StreamingLLM] | type[Scorer]] = {
    "streamingllm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "tova": TOVA,
    "keydiff": KeyDiff,
    "expectedattention": ExpectedAttention,
}
_KNOWN = ("none", *POLICIES)


def policy_name(policy: StreamingLLM | Scorer) -> str:
    """Its name in `POLICIES`."""
    return type(policy).__name__.lower()


def parse_policy(text: str) -> Policy | None:
    """A policy as text, "snapkv:budget=25%,window=32": its name, then fields in any order; "none" is None.

    A budget is tokens ("512"), or a share as a percentage ("25%") or with a point ("0.25"). ParameterError names what is
    unknown, with the nearest that is known, or wrong.
    """
    if not isinstance(text, str):
        raise ParameterError(f"policy must be a policy or its text, got {text!r:.80}")
    name, _, rest = text.strip().partition(":")
    name = choose("policy", name.strip().lower(), _KNOWN)
    given = _assignments(name, rest)
    if name == "none":
        if given:
            raise ParameterError(f"policy 'none' takes no fields, got {next(iter(given))!r}")
        return None
    kind = POLICIES[name]
    known = _names(kind)
    values = {choose(f"a field of {name}", each, known): _value(each, value) for each, value in given.items()}
    return kind(**values)  # type: ignore[return-value] # of POLICIES, Scorer itself is none


def policy_of(given: object) -> Policy | None:
    """A policy as it was written down: one, its text, or None."""
    if given is None or isinstance(given, Policy):
        return given
    return parse_policy(given)  # type: ignore[arg-type] # which checks it


def policy_text(policy: Policy | None) -> str:
    """The text that `parse_policy` makes this policy of: every field but `at` where it is None."""
    if policy is None:
        return "none"
    shown = []
    for name in _names(policy):
        value = getattr(policy, name)
        if value is not None:
            shown.append(f"{name}={_budget_text(value) if name == 'budget' else value}")
    return f"{policy_name(policy)}:{','.join(shown)}"


def _names(policy: Policy | type[StreamingLLM] | type[Scorer]) -> list[str]:
    """Of the fields that are given."""
    return [each.name for each in fields(policy) if each.init]


def _exactly(share: float) -> Fraction:
    """The share as it was written: 0.1 is a tenth, not the double beside it."""
    return Fraction(repr(share))


def _budget_text(budget: float) -> str:
    if isinstance(budget, int):
        return str(budget)
    percent = (Decimal(repr(budget)) * 100).normalize()
    return f"{percent:f}%" if budget >= 1e-6 else f"{percent}%"


def _assignments(name: str, text: str) -> dict[str, str]:
    """Of "budget=25%,window=32"."""
    found: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        given, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not given or not value:
            raise ParameterError(f"policy {name}: expected FIELD=VALUE, got {part.strip()!r:.80}")
        if given in found:
            raise ParameterError(f"policy {name}: {given} is given twice")
        found[given] = value
    return found


def _value(name: str, text: str) -> Any:
    """A field's value: an integer where all are digits, else a number; "none" for `at`; a budget may end in %."""
    if name == "at" and text.lower() == "none":
        return None
    share = name == "budget" and text.endswith("%")
    digits = text.removesuffix("%") if share else text
    try:
        if len(digits) > 40:
            raise InvalidOperation
        number = Decimal(digits)
    except InvalidOperation:
        raise ParameterError(f"{name} must be a number, got {text!r:.80}") from None
    if share:
        return float(number / 100)
    return int(digits) if digits.lstrip("+-").isdecimal() else float(number)
