"""What a server says when it does not answer: its reason, and when to come back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from kvik.errors import one_line

__all__ = ["reason_of", "seconds_of"]

MAX_REASON = 300  # characters
_READ_BYTES = 1 << 16


def reason_of(answer: bytes) -> str:
    """The message in an error's body: OpenAI's `error.message`, FastAPI's `detail`, or its first line of text."""
    try:
        found = _message(json.loads(answer[:_READ_BYTES]))
    except (ValueError, RecursionError):
        found = None
    if found is None:
        lines = answer[:_READ_BYTES].decode("utf-8", "replace").splitlines()
        found = next((line.strip() for line in lines if line.strip()), "no reason is given")
    shown = one_line(found)
    return shown if len(shown) <= MAX_REASON else shown[:MAX_REASON] + "…"


def _message(value: Any) -> str | None:
    for _ in range(4):  # error.message, detail[0].msg
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, list) and value:
            value = value[0]
        elif isinstance(value, Mapping):
            value = next((value[key] for key in ("error", "message", "detail", "msg") if value.get(key)), None)
        else:
            return None
    return None


def seconds_of(header: str | None) -> float:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); 0 where it says nothing."""
    if header is None:
        return 0.0
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return 0.0
