"""Synonyms from a WordNet folder: the database files of wndb(5WN), looked up as nltk does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvik.errors import DataError

__all__ = ["WordNet"]

# Endings of inflected forms and what takes their place, by part of speech: morphy(7WN).
_NOUN = "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y"
_VERB = "s: ies:y es:e es: ed:e ed: ing:e ing:"
_ADJECTIVE = "er: est: er:e est:e"
_PARTS = {"noun": ("n", _NOUN), "verb": ("v", _VERB), "adj": ("a", _ADJECTIVE), "adv": ("r", "")}


class WordNet:
    """A WordNet in memory (about 60 MB): `synonyms`.

    folder: with index.X, data.X and X.exc for X in noun, verb, adj, adv; nltk's corpora/wordnet or Debian's /usr/share/wordnet.
    Raises DataError for a folder that is none, naming what is missing or broken.
    digest: of all files, to know the edition by.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = {name: self._read(name) for part in _PARTS for name in (f"index.{part}", f"data.{part}", f"{part}.exc")}
        self.digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
        self._parts = [
            _Part(
                self.folder, part,
                _index(self.folder / f"index.{part}", files[f"index.{part}"], letter),
                files[f"data.{part}"],
                {line[0]: line[1:] for line in map(str.split, files[f"{part}.exc"].decode().splitlines()) if line},
                tuple((old, new) for old, _, new in (rule.partition(":") for rule in rules.split())),
            )
            for part, (letter, rules) in _PARTS.items()
        ]  # fmt: skip
        self._synonyms = cache(self._look_up)

    def _read(self, name: str) -> bytes:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"not a WordNet folder: {name} is missing", path=self.folder)
        found = path.read_bytes()
        try:
            found.decode()
        except UnicodeDecodeError as broken:
            raise DataError("not a file of WordNet: no UTF-8", path=path, offset=broken.start) from None
        return found

    def synonyms(self, word: str) -> frozenset[str]:
        """Words that share a meaning with the word or with a form it is inflected from, as any part of speech.

        Single words only; case as WordNet has it. Empty for a word that is not there.
        """
        return self._synonyms(word.lower())

    def _look_up(self, word: str) -> frozenset[str]:
        return frozenset(
            name
            for part in self._parts
            for form in part.forms(word)
            for offset in part.offsets(form)
            for name in part.names(offset)
            if "_" not in name
        )


def _index(path: Path, text: bytes, letter: str) -> dict[str, str]:
    """Of each entry of an index file what follows its word and part of speech."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.decode().splitlines(), 1):
        if not line or line.startswith(" "):  # the licence
            continue
        word, _, rest = line.partition(f" {letter} ")
        if not rest:
            raise DataError(f"line {number} is no entry of a WordNet index", path=path)
        found[word] = rest
    return found


@dataclass(frozen=True)
class _Part:
    """A part of speech. exceptions: irregular forms and what they come from; rules: endings, and what takes their place."""

    folder: Path
    name: str
    index: dict[str, str]
    data: bytes
    exceptions: dict[str, list[str]]
    rules: tuple[tuple[str, str], ...]

    def forms(self, word: str) -> list[str]:
        """The word and what it may be inflected from, as far as the index has it."""
        found = self.exceptions.get(word)
        if found is None:
            found = [word.removesuffix(old) + new for old, new in self.rules if word.endswith(old)]
        return [form for form in dict.fromkeys([word, *found]) if form in self.index]

    def offsets(self, form: str) -> list[int]:
        """Of the form's synsets in the data file: the last fields of its entry, as many as the first says."""
        fields = self.index[form].split()
        try:
            number = int(fields[0])
            return [int(field) for field in fields[len(fields) - number :]]
        except (ValueError, IndexError):
            raise DataError(
                f"the entry {form!r} is no entry of a WordNet index", path=self.folder / f"index.{self.name}"
            ) from None

    def names(self, offset: int) -> list[str]:
        """The words of a synset: its line has their number (hexadecimal) and, for each, word and lexical id."""
        try:
            line = self.data[offset : self.data.find(b"\n", offset)].decode().partition("|")[0].split()
            if int(line[0]) != offset:
                raise ValueError
            return [name.partition("(")[0] for name in line[4 : 4 + 2 * int(line[3], 16) : 2]]
        except (ValueError, IndexError):
            raise DataError("no synset of WordNet", path=self.folder / f"data.{self.name}", offset=offset) from None
