"""Kvik beside other engines, measured in one run. `python -m bench.run --help`; README.md in this folder."""

from __future__ import annotations


class BenchError(Exception):
    """One line for the user: what is missing or went wrong, and what to do."""
