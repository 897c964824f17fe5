"""A trace says what a slow reading of the definitions says, and changes nothing about the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvik.decoding.edits import Edits
from kvik.decoding.pipeline import DrawRequest
from kvik.decoding.sampler import sample_rows_by_definition
from kvik.decoding.trace import BEST, TEMPERATURES, trace_token
from kvik.params import SamplingParams


def softmax(values):
    best = max(values)
    e = [math.exp(v - best) if v > -math.inf else 0.0 for v in values]
    return [x / sum(e) for x in e]


def row_of(seed, size=60):
    return (np.random.default_rng(seed).normal(size=size) * 3).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
        SamplingParams(temperature=1.5, top_k=40, top_p=0.95, min_p=0.05),
        SamplingParams(temperature=0.0),
    ],
)
def test_against_a_slow_reading(seed, params):
    row = row_of(seed)
    request = DrawRequest(params, seed, 0, 7)
    (drawn,) = sample_rows_by_definition(row[None], [request])
    trace = trace_token(row, request, drawn.token_id)
    values = [float(x) for x in row]
    p = softmax(values)
    order = sorted(range(len(p)), key=lambda t: (-values[t], t))
    assert (trace.token_id, trace.position) == (drawn.token_id, 7)
    assert trace.rank == order.index(drawn.token_id) + 1
    assert trace.probability == pytest.approx(p[drawn.token_id]) == pytest.approx(math.exp(drawn.logprob))
    assert trace.entropy == pytest.approx(-sum(x * math.log(x) for x in p))
    nucleus, total = 0, 0.0
    while total < trace.nucleus_p - 1e-12:
        total += p[order[nucleus]]
        nucleus += 1
    assert trace.nucleus == nucleus
    assert trace.nucleus_p == (params.top_p if params.top_p < 1 else 0.9)
    names = [stage.name for stage in trace.stages]
    wanted = {"temperature": True, "top_k": params.top_k, "top_p": params.top_p < 1, "min_p": params.min_p}
    assert names == ["logits", "greedy"] or names == ["logits", *(name for name in wanted if wanted[name])]
    assert [c.token_id for c in trace.candidates][:BEST] == order[:BEST]
    assert drawn.token_id in [c.token_id for c in trace.candidates]


def test_what_each_stage_removed():
    row = np.log(np.array([0.4, 0.3, 0.15, 0.08, 0.05, 0.02], np.float32))  # the guide's example of section 2.7
    params = SamplingParams(top_k=5, top_p=0.9)
    trace = trace_token(row, DrawRequest(params, 0, 0, 0), 1)
    logits, temperature, top_k, top_p = trace.stages
    assert (logits.kept, logits.removed) == (6, 0) and (temperature.removed, temperature.mass) == (0, 0.0)
    assert (top_k.kept, top_k.removed) == (5, 1) and top_k.mass == pytest.approx(0.02)
    assert (top_p.kept, top_p.removed) == (4, 1) and top_p.mass == pytest.approx(0.05 / 0.98)
    assert [c.removed_by for c in trace.candidates] == [None, None, None, None, "top_p", "top_k"]
    assert trace.drawn_probability == pytest.approx(0.3 / 0.93)
    assert trace.candidates[5].shares == pytest.approx((0.02, 0.02, 0.0, 0.0))


def test_edits_are_stages():
    row = row_of(1)
    ids = np.array([int(row.argmax())], np.int32)
    request = DrawRequest(SamplingParams(temperature=0.0), 0, 0, 0, Edits(banned=ids))
    (drawn,) = sample_rows_by_definition(row[None], [request])
    trace = trace_token(row, request, drawn.token_id)
    assert [stage.name for stage in trace.stages] == ["logits", "banned", "greedy"]
    assert trace.rank == 2 and trace.drawn_probability == 1.0
    assert trace.candidates[0].removed_by == "banned" and trace.candidates[2].removed_by == "greedy"


def test_sweep_is_the_softmax_at_each_temperature():
    row = row_of(2)
    for own, more in ((1.0, []), (0.9, [0.9]), (0.0, []), (9.0, [])):
        found = trace_token(row, DrawRequest(SamplingParams(temperature=own), 0, 0, 0), int(row.argmax()))
        assert [one.temperature for one in found.sweep] == sorted([*TEMPERATURES, *more])
    trace = trace_token(row, DrawRequest(SamplingParams(), 0, 0, 0), int(row.argmax()))
    for one in trace.sweep:
        p = softmax([float(x) / one.temperature for x in row])
        assert one.shares == pytest.approx([p[c.token_id] for c in trace.candidates])
        assert one.entropy == pytest.approx(-sum(x * math.log(x) for x in p if x))
    assert [one.entropy for one in trace.sweep] == sorted(one.entropy for one in trace.sweep)


def test_a_drawn_token_outside_the_best_is_there():
    row = row_of(3)
    worst = int(row.argmin())
    trace = trace_token(row, DrawRequest(SamplingParams(), 0, 0, 0), worst)
    assert trace.rank == 60 and len(trace.candidates) == BEST + 1 and trace.candidates[-1].token_id == worst


def test_a_probability_of_nothing_is_not_removed():
    row = np.array([0.0, -900.0], np.float32)
    trace = trace_token(row, DrawRequest(SamplingParams(temperature=0.5), 0, 0, 0), 0)
    assert [c.removed_by for c in trace.candidates] == [None, None] and trace.candidates[1].shares[-1] == 0.0


def test_masked_logits_and_small_vocabularies():
    row = np.array([0.0, -np.inf, 1.0], np.float32)
    trace = trace_token(row, DrawRequest(SamplingParams(top_k=1), 0, 0, 0), 2)
    assert [c.token_id for c in trace.candidates] == [2, 0]
    assert trace.stages[0].kept == 2 and trace.stages[0].removed == 1
