from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kvik.errors import DataError, ParameterError
from kvik.evaluation.correlate import Setting, correlate

RNG = np.random.default_rng(3)
X, Z = RNG.normal(size=9), RNG.normal(size=9).round(1)
Y = -X + RNG.normal(0, 0.3, 9)


def settings(**columns) -> list[Setting]:
    rows = zip(*columns.values(), strict=True)
    return [Setting(f"s{i}", dict(zip(columns, row, strict=True))) for i, row in enumerate(rows)]


def test_against_scipy() -> None:
    longppl, perplexity = correlate(settings(longppl=X, perplexity=Z, score=Y), ["longppl", "perplexity"], "score")
    for found, values in ((longppl, X), (perplexity, Z)):
        assert found.pearson.value == pytest.approx(stats.pearsonr(values, Y).statistic, abs=1e-12)
        assert found.spearman.value == pytest.approx(stats.spearmanr(values, Y).statistic, abs=1e-12)
        assert found.pearson.low <= found.pearson.value <= found.pearson.high
        assert (found.settings, found.left_out, found.undefined, found.score) == (9, (), None, "score")
    assert longppl.measure == "longppl" and longppl.pearson.value < -0.9 and longppl.pearson.high < 0


def test_what_was_not_measured_is_left_out_by_name() -> None:
    x = [None, *X[1:]]
    (found,) = correlate(settings(longppl=x, score=Y), ["longppl"], "score")
    assert (found.settings, found.left_out) == (8, ("s0",))
    assert found.pearson.value == pytest.approx(stats.pearsonr(X[1:], Y[1:]).statistic)


@pytest.mark.parametrize(("x", "y", "name"), [([1.0] * 4, [1, 2, 3, 4], "ppl"), ([1, 2, 3, 4], [0.5] * 4, "score")])
def test_a_constant_column_has_no_correlation(x, y, name: str) -> None:
    (found,) = correlate(settings(ppl=x, score=y), ["ppl"], "score")
    assert found.pearson is found.spearman is None
    assert found.undefined == f"{name} is the same in all settings: no correlation is defined"


def test_refusals() -> None:
    with pytest.raises(DataError, match="of ppl with score needs at least 3 settings, got 2"):
        correlate(settings(ppl=[1, 2], score=[1, 2]), ["ppl"], "score")
    with pytest.raises(DataError, match="got 2; s2, s3 lack one of the two"):
        correlate(settings(ppl=[1, 2, None, 4], score=[1, 2, 3, None]), ["ppl"], "score")
    with pytest.raises(ParameterError, match="setting 's0' has no 'kl', only ppl, score"):
        correlate(settings(ppl=[1, 2, 3], score=[1, 2, 3]), ["kl"], "score")
    with pytest.raises(ParameterError, match="ppl of setting 's1' must be finite, got inf"):
        correlate(settings(ppl=[1, math.inf, 3], score=[1, 2, 3]), ["ppl"], "score")
