"""Kvik beside other engines, measured in one run. README.md in this folder."""

from __future__ import annotations


class BenchError(Exception):
    """One line for the user: what is missing or went wrong, and what to do."""
