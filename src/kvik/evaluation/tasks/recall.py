"""Items of recall tasks: prompts whose answer stands somewhere in a context, and whether a model gives it.

With a cache that evicts, it matters when the question is known. `inside`: tokens are evicted at the prompt's end, and the
question has been read by then. `after`: they are evicted where the context ends, and the question comes to what was kept.
The prompt is the same, so that a full cache answers both alike and differences are of pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from kvik.evaluation.model import TextTokens
from kvik.evaluation.statistics import Interval, bootstrap_mean, paired_bootstrap, permutation_test
from kvik.evaluation.tasks.texts import sentences
from kvik.params import SamplingParams, choose
from kvik.params.checks import integer

__all__ = [
    "DIGITS", "MOST_TOKENS", "PLACES", "Compared", "Place", "RecallItem", "Recalled", "answer_params", "answers", "beginning", "compared", "filler",
    "given", "recalled", "task_draw",
]  # fmt: skip

Place = Literal["inside", "after"]
PLACES: tuple[Place, ...] = get_args(Place)
"""Of the question, beside the eviction."""
MOST_TOKENS = 1 << 24
DIGITS = 3


@dataclass(frozen=True)
class RecallItem:
    """A context with a question about it.

    Attributes:
        task: its name in TASKS.
        prompt: token ids, context and question, the answer's beginning in the question's words.
        context_tokens: tokens of the prompt before the question.
        fact: [first, last) tokens of the prompt that tell the answer.
        question, answer: as text. The answer occurs once in the context and not in the question.
        answer_ids: tokens of the answer behind the prompt.
    """

    task: str
    prompt: tuple[int, ...]
    context_tokens: int
    fact: tuple[int, int]
    question: str
    answer: str
    answer_ids: tuple[int, ...]

    def at(self, place: Place) -> int:
        """Tokens after which to evict, for a policy's `at`."""
        return len(self.prompt) if choose("question", place, PLACES) == "inside" else self.context_tokens

    @property
    def depth(self) -> float:
        """Where in the context the fact stands: 0 is its beginning, 1 its end."""
        room = self.context_tokens - (self.fact[1] - self.fact[0])
        return self.fact[0] / room if room else 0.0


class Recalled(NamedTuple):
    """share: of the items that are answered, with its interval. right: of each."""

    share: Interval
    right: tuple[bool, ...]


class Compared(NamedTuple):
    """b less a over the same items, in shares; p: of "no difference", by permutation."""

    difference: Interval
    p: float


# --- asking


def answer_params(item: RecallItem) -> SamplingParams:
    """The most probable tokens, as many as the answer has."""
    return SamplingParams(max_tokens=len(item.answer_ids), temperature=0.0, ignore_eos=True)


def given(item: RecallItem, tokens: Sequence[int]) -> bool:
    """Whether these tokens behind the prompt are just the answer's."""
    return tuple(tokens) == item.answer_ids


def recalled(items: Sequence[RecallItem], answers: Iterable[Any], *, seed: int = 0) -> Recalled:
    """answers: completions (with `choices`, of which the first counts), in the items' order."""
    right = tuple(given(item, answer.choices[0].token_ids) for item, answer in zip(items, answers, strict=True))
    return Recalled(bootstrap_mean(right, seed=seed), right)


def compared(a: Recalled, b: Recalled, *, seed: int = 0) -> Compared:
    """Paired: by bootstrap and by permutation over the items."""
    return Compared(paired_bootstrap(a.right, b.right, seed=seed), permutation_test(a.right, b.right, seed=seed))


# --- making


def task_draw(task: str, seed: int, number: int, tokens: int) -> random.Random:
    """What item `number` of a task is drawn from; other items do not change it."""
    integer("seed", seed, 0)
    integer("number", number, 0)
    integer("tokens", tokens, 1, MOST_TOKENS)
    return random.Random(f"kvik/{task}/{seed}/{number}/{tokens}")


def filler(tokenizer: TextTokens, draw: random.Random, room: int) -> list[list[int]]:
    """Sentences as token ids, `room` of them together: the first lacks as much of its beginning as makes that so."""
    pieces: list[list[int]] = []
    for sentence in sentences(draw):
        if room <= 0:
            break
        ids = tokenizer.encode(sentence, add_special=False, first=False)
        pieces.append(ids[-room:])
        room -= len(ids)
    return pieces[::-1]


def answers(draw: random.Random, digits: int, others: int) -> tuple[str, list[str]]:
    """A number of so many digits, 2 to 9, that is asked for, and others that differ from it."""
    integer("digits", digits, 2, 9)
    least, most = 10 ** (digits - 1), 10**digits - 1
    asked = draw.randint(least, most)
    rest = (draw.randint(least, most - 1) for _ in range(others))  # the one asked for left out
    return str(asked), [str(other + (other >= asked)) for other in rest]


def beginning(tokenizer: TextTokens, text: str) -> list[int]:
    """Token ids of the text that a prompt begins with."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text, add_special=False, first=True)
