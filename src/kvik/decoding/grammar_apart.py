"""Tries a long grammar in a process of its own, whose time, memory and stack are its own to lose."""

from __future__ import annotations

import json
import subprocess
import sys

from kvik.decoding.grammar_source import LIMITS, shortened
from kvik.errors import ParameterError

__all__ = ["check_apart"]

SECONDS = 0.4
MEGABYTES = 400
_TRIAL = """
import json, resource, signal, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
limits, seconds, megabytes = json.loads(sys.argv[1])
source = sys.stdin.buffer.read().decode()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, seconds)
matcher = LLMatcher(LLTokenizer("byte"), source, limits=LLParserLimits(**limits), log_level=0)
matcher.compute_bitmask()
sys.stdout.buffer.write(matcher.get_error().encode())
"""


def check_apart(source: str) -> None:
    """Compile it and compute its first mask, or raise ParameterError: what is wrong with it, or that it takes too much."""
    settings = json.dumps([LIMITS, SECONDS, MEGABYTES])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL, settings], input=source.encode(), capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        raise ParameterError("grammar: too costly: it was not compiled within a minute") from None
    if done.returncode:
        raise ParameterError(f"grammar: too costly to compile: more than {SECONDS:g} s, {MEGABYTES} MB or its stack")
    if done.stdout:
        raise ParameterError(f"grammar: {shortened(done.stdout.decode())}")
