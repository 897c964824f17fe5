"""Advice as data and arithmetic: what to run for a task, before anything is run."""

from kvik.planning.decoding import ADVICE, TECHNIQUES, Advice, DecodingPlan, Technique, command_line, plan_decoding
from kvik.planning.strategies import STRATEGIES, Strategy, sweep

__all__ = [
    "ADVICE",
    "STRATEGIES",
    "TECHNIQUES",
    "Advice",
    "DecodingPlan",
    "Strategy",
    "Technique",
    "command_line",
    "plan_decoding",
    "sweep",
]
