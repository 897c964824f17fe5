"""The windows of texts, as options that verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvik.errors import ParameterError

__all__ = ["Stride", "check_windows", "window_option"]

Stride = Annotated[
    int | None,
    typer.Option(
        "--stride", metavar="N", show_default="the window less one",
        help="Tokens that each window after the first predicts anew; the others are context.",
    ),
]  # fmt: skip


def window_option(default: int) -> Any:
    """--window, whose default is so many tokens, or the model's context."""
    return typer.Option(
        "--window", metavar="N", show_default=f"{default}, or the model's context where that is less",
        help="Most tokens of a window, at least 2.",
    )  # fmt: skip


def check_windows(window: int | None, stride: int | None) -> None:
    """What is wrong whatever the model's context, before one is loaded. Raises ParameterError naming the option."""
    for name, value, low in (("window", window, 2), ("stride", stride, 1)):
        if value is not None and value < low:
            raise ParameterError(f"--{name} must be at least {low}, got {value}")
    if window is not None and stride is not None and stride >= window:
        raise ParameterError(f"--stride must be in [1, {window - 1}], below --window, got {stride}")
