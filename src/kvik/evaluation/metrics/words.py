"""Words and their stems, as the metrics of texts take them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from kvik.errors import ParameterError

__all__ = ["porter", "words"]

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and each other visible character; case kept."""
    return _WORD.findall(text)


def porter(what: str) -> Callable[[str], str]:
    """nltk's Porter stemmer (Porter 1980, with nltk's extensions), which remembers the words it had.

    what: wants it, for the message of the ParameterError where nltk is missing.
    """
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as missing:
        raise ParameterError(f'{what} needs nltk: pip install "kvik[eval]"') from missing
    stem: Callable[[str], str] = cache(PorterStemmer().stem)
    return stem
