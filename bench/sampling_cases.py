"""The settings whose sampling is measured, by name, with the fields of SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping

SEQUENCES = 16
SEEN = 256
"""Distinct tokens that the repetition penalty of a sequence looks at."""

CASES: Mapping[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "typical": {"temperature": 1.0, "typical_p": 0.9},
    "combined": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.15},
}
