"""What the evaluations read: English that every Python has, and pairs of texts for the metrics."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

LINE_WORDS = (12, 20)
SAMPLE_LINES = (5, 7)
"""A text of 5 to 7 lines of 12 to 20 words: about 100 words."""
EDITED = 0.3
"""Share of a reference's words that its prediction drops, replaces or moves."""


def english(characters: int) -> str:
    """At least so many characters where this Python has them: pydoc's topics, then the docstrings of its library."""
    parts, length = [], 0
    for part in chain(topics(), docstrings()):
        if length >= characters:
            break
        parts.append(part)
        length += len(part) + 2
    return "\n\n".join(parts)


def topics() -> Iterator[str]:
    from pydoc_data.topics import topics as found

    yield from (found[name] for name in sorted(found))


def docstrings() -> Iterator[str]:
    """Of the library's modules, and of the classes and functions in them, by file name."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template or a file that is wrong on purpose has no docstrings
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text


def pairs(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Predictions and references: pieces of English in lines, and the same with words dropped, replaced and moved."""
    draw, words = random.Random(f"{seed}/pairs"), " ".join(topics()).split()
    references = [lines(draw, words) for _ in range(count)]
    predictions = [[edited(draw, line, words) for line in reference] for reference in references]
    return joined(predictions), joined(references)


def joined(texts: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    return ["\n".join(" ".join(line) for line in text) for text in texts]


def lines(draw: random.Random, words: Sequence[str]) -> list[list[str]]:
    lengths = [draw.randint(*LINE_WORDS) for _ in range(draw.randint(*SAMPLE_LINES))]
    at, found = draw.randrange(len(words) - sum(lengths)), []
    for length in lengths:
        found.append(list(words[at : at + length]))
        at += length
    return found


def edited(draw: random.Random, line: Sequence[str], words: Sequence[str]) -> list[str]:
    """The line, each word of it dropped, replaced or moved to the front with EDITED ÷ 3 each; never empty."""
    found: list[str] = []
    for word in line:
        chance = draw.random()
        if chance < EDITED / 3:
            continue
        if chance < 2 * EDITED / 3:
            found.append(draw.choice(words))
        elif chance < EDITED:
            found.insert(0, word)
        else:
            found.append(word)
    return found or list(line)
