"""The sampling options beyond temperature, top-k, top-p and min-p, and how options are declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvik.errors import ParameterError
from kvik.params import PRESETS, SamplingParams

__all__ = ["SAMPLING_PANEL", "STRATEGY_PANEL", "StrategyOptions", "biases", "choices", "option"]

SAMPLING_PANEL, STRATEGY_PANEL = "Sampling", "Penalties and further filters"
MODEL_DEFAULTS = ("repetition_penalty", "no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Of the fields here those that a model's generation_config.json has."""


def option(name: str | tuple[str, ...], help: str, panel: str, default: str | None = None, **more: Any) -> Any:
    """default: how it is shown in the help; None is the field's own, "" is nothing."""
    names = (name,) if isinstance(name, str) else name
    shown: Any = default is None if default in (None, "") else default
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=shown, **more)


def choices(*names: str) -> Callable[[str], list[str]]:
    """What a shell completes an option's value to."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def biases(texts: Sequence[str]) -> dict[int, float]:
    """Biases by token id, of "ID=BIAS" texts, several separated by commas."""
    found: dict[int, float] = {}
    for piece in (piece for text in texts for piece in text.split(",")):
        token, equals, bias = piece.partition("=")
        try:
            if not equals or int(token) in found:
                raise ValueError
            found[int(token)] = float(bias)
        except ValueError:
            raise ParameterError(f"--logit-bias takes ID=BIAS, each id once, got {','.join(texts)!r}") from None
    return found


def _off(name: str, help: str, metavar: str = "X") -> Any:
    """An option whose default is the field's, or that of a model which has one."""
    own = "the model's own, else " if name in MODEL_DEFAULTS else ""
    default = f"{own}{getattr(SamplingParams, name):g}"
    return option(f"--{name.replace('_', '-')}", help, STRATEGY_PANEL, default, metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Fields of SamplingParams; None is what was not given."""

    preset: Annotated[
        str | None,
        option("--preset", f"Temperature, top-k, top-p and repetition penalty at once: {', '.join(PRESETS)}. Options beside "
               "it replace its values.", SAMPLING_PANEL, "", metavar="NAME", autocompletion=choices(*PRESETS)),
    ] = None  # fmt: skip
    repetition_penalty: Annotated[
        float | None,
        _off("repetition_penalty", "Divides positive logits of tokens in prompt or answer, multiplies negative ones."),
    ] = None
    presence_penalty: Annotated[
        float | None, _off("presence_penalty", "Subtracted from logits of tokens the answer has already, -2 to 2.")
    ] = None
    frequency_penalty: Annotated[
        float | None, _off("frequency_penalty", "Subtracted once for every time the answer has the token, -2 to 2.")
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None, _off("no_repeat_ngram_size", "No N tokens come twice in a row, prompt included; 0 is off.", "N")
    ] = None
    dry_multiplier: Annotated[
        float | None, _off("dry_multiplier", "Penalty of what would go on repeating; 0 is off.")
    ] = None
    dry_base: Annotated[
        float | None, _off("dry_base", "The penalty grows by this factor with each repeated token, 1 to 10.")
    ] = None
    dry_allowed_length: Annotated[
        int | None, _off("dry_allowed_length", "Longest repetition without penalty, at least 1.", "N")
    ] = None
    dry_range: Annotated[int | None, _off("dry_range", "How many last tokens are looked at; 0 is all.", "N")] = None
    dry_breakers: Annotated[
        list[str] | None,
        option("--dry-breakers", "Text that no repetition reaches across. Repeat it for up to 16.", STRATEGY_PANEL,
               "line break, colon, double quote, asterisk", metavar="TEXT"),
    ] = None  # fmt: skip
    typical_p: Annotated[
        float | None,
        _off("typical_p", "Keep tokens whose information is nearest the entropy, up to probability P; 1 is off.", "P"),
    ] = None
    epsilon_cutoff: Annotated[
        float | None, _off("epsilon_cutoff", "Keep tokens of at least this probability; 0 is off.", "P")
    ] = None
    eta_cutoff: Annotated[
        float | None, _off("eta_cutoff", "Keep tokens of at least min(E, sqrt(E) exp(-entropy)); 0 is off.", "E")
    ] = None
    top_n_sigma: Annotated[
        float | None, _off("top_n_sigma", "Keep tokens within N standard deviations of the best logit; 0 is off.", "N")
    ] = None
    xtc_probability: Annotated[
        float | None, _off("xtc_probability", "How often the most probable tokens are left out, 0 to 1; 0 is off.", "P")
    ] = None
    xtc_threshold: Annotated[
        float | None, _off("xtc_threshold", "Of the tokens above it XTC leaves out all but the least, 0 to 0.5.", "P")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        option("--logit-bias", "Added to the logit of a token id, -100 to 100. May be repeated.", STRATEGY_PANEL, "",
               metavar="ID=BIAS"),
    ] = None  # fmt: skip
    bad_words: Annotated[
        list[str] | None,
        option(
            "--bad-words", "Text that does not come out. Repeat it for up to 256.", STRATEGY_PANEL, "", metavar="TEXT"
        ),
    ] = None
