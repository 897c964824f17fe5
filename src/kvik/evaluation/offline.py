"""A text that needs no file: what is measured on where none is named."""

from __future__ import annotations

import sys

__all__ = ["TEXT_NAME", "offline_text"]

TEXT_NAME = (
    f"the language reference inside Python {sys.version_info.major}.{sys.version_info.minor} (pydoc_data.topics)"
)


def offline_text() -> str:
    """English text that every Python has: `TEXT_NAME` says which."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
