"""`kvik models show --quality`: what a weights format costs, measured against a more exact form of the same model."""

from __future__ import annotations

import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvik.cli import options
from kvik.cli.input import read_text
from kvik.cli.machine import memory
from kvik.cli.model_spec import ROOM_BYTES
from kvik.cli.output import Progress, amount, print_table, write
from kvik.errors import DataError, ParameterError, TryAgainError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvik.evaluation.divergence import Divergence
    from kvik.llm import LLM
    from kvik.models.facts import ModelFacts
    from kvik.weights.layouts import Weights
    from kvik.weights.store import ModelStore

__all__ = ["Measured", "measure", "print_quality"]

_ROWS_BYTES = 8 * 64 * 4  # for each token of the vocabulary: both models' logits of 64 rows, and what is made of them


@dataclass(frozen=True)
class Quality:
    """Of `Divergence`, what says most. base_perplexity: the reference's."""

    tokens: int
    kl_mean: float
    kl_p99: float
    same_top: float
    perplexity: float
    base_perplexity: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Measured:
    """Quality of `weights` against `base`, and why that is not f32 where it is not; text says what was predicted."""

    weights: Weights
    base: Weights
    base_reason: str | None
    text: str
    window: int
    figures: Quality


def measure(path: Path, weights: Weights, store: ModelStore, tokens: int, text: str | None) -> Measured:
    """Run both forms over the text.

    text: a file's name; None is what every Python has. Raises ParameterError where there is nothing to compare,
    TryAgainError where memory is short, DataError for a source that does not run.
    """
    from kvik.evaluation.divergence import DEFAULT_WINDOW, divergence
    from kvik.evaluation.offline import TEXT_NAME, offline_text
    from kvik.models.facts import read_facts

    if tokens < 1:
        raise ParameterError(f"--tokens must be at least 1, got {tokens}")
    if weights == "f32":
        raise ParameterError("--quality compares with f32 weights; give another --weights")
    facts = read_facts(path, weights)
    if facts.refused is not None:
        raise DataError(facts.refused)
    assert facts.config is not None and facts.packed_bytes is not None  # as nothing is refused
    window = min(DEFAULT_WINDOW, facts.config.context_length)
    base, reason = _base(facts, facts.packed_bytes + _ROWS_BYTES * facts.config.vocab_size + ROOM_BYTES)
    words = offline_text() if text is None else read_text(text)
    with _forgotten(store, facts, base):
        other, exact = _load(facts, facts.weights), _load(facts, base)
        with Progress(unit="tokens") as progress:
            found = divergence(
                other, exact, words, window=window, tokens=tokens, flips=0,
                progress=lambda done, _: progress("compare", done, tokens),
            )  # fmt: skip
    return Measured(facts.weights, base, reason, text or TEXT_NAME, window, _quality(found))


def _quality(found: Divergence) -> Quality:
    return Quality(
        found.tokens, found.kl_mean, found.kl_p99, found.same_top, found.perplexity, found.reference_perplexity,
        found.perplexity_ratio,
    )  # fmt: skip


def _base(facts: ModelFacts, beside: int) -> tuple[Weights, str | None]:
    """What to compare with: f32, or where that does not fit beside so many bytes the file's own weights, and why."""
    from kvik.models.facts import read_facts

    need, free = beside + (read_facts(facts.path, "f32").packed_bytes or 0), memory().available
    if need <= free:
        return "f32", None
    reason = f"f32 weights beside these would need {amount(need)} of memory, {amount(free)} are free"
    if facts.weights == "auto":
        raise TryAgainError(f"{reason}; close other programs, or measure another --weights against auto")
    return "auto", reason


def _load(facts: ModelFacts, weights: Weights) -> LLM:
    """KV in f32, so that what differs are the weights and the rounding that goes with them."""
    with Progress() as progress:
        return options.make_llm(str(facts.path), weights=weights, kv="f32", progress=progress)


@contextmanager
def _forgotten(store: ModelStore, facts: ModelFacts, weights: Weights) -> Iterator[None]:
    """A packed form that was not there before is removed afterwards: f32 weights are several times the file."""
    path = store.folder_for(facts.path) / f"weights-{weights}.kvik"
    there = path.exists()
    try:
        yield
    finally:
        if not there:
            path.unlink(missing_ok=True)


def print_quality(found: Measured) -> None:
    """The figures, each with what it means."""
    q = found.figures
    why = f" ({found.base_reason})" if found.base_reason else ""
    what = (
        f"--weights {found.weights} against {found.base}{why}, {q.tokens} predictions in windows of {found.window} "
        f"tokens, of {found.text}:"
    )
    write("\n" + textwrap.fill(what, 80, break_long_words=False, break_on_hyphens=False) + "\n\n")
    rows: list[list[Any]] = [
        ["KL, mean", f"{q.kl_mean:.6f}", "nats a prediction loses; 0 is the same distribution"],
        ["KL, 99 %", f"{q.kl_p99:.6f}", "99 of 100 predictions lose less"],
        ["same best", f"{q.same_top:.2%}".replace("%", " %"), "predictions whose most probable token stays"],
        ["perplexity", f"{q.perplexity_ratio:.4f}", f"{q.perplexity:.4g} of {q.base_perplexity:.4g}; 1 is the same"],
    ]
    print_table(rows, "<><")
