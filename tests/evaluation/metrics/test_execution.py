"""pass@k against exact fractions and by drawing; execution accuracy with outputs, with programs, with queries on SQLite."""

from __future__ import annotations

import math
import random
import sqlite3
import time
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvik
from kvik.errors import DataError, ParameterError
from kvik.evaluation.metrics import METRICS
from kvik.evaluation.metrics.execution import Outcome, execution_accuracy, pass_at_k, pass_rates
from kvik.evaluation.metrics.sql import has_order

NCK = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(NCK)
def test_pass_at_k_is_the_exact_fraction(nck):
    n, c, k = nck
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)


def test_pass_at_k_is_the_share_of_draws_that_have_a_pass():
    n, c, k = 9, 2, 4
    draws = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws), abs=1e-15)


@given(NCK)
def test_pass_at_k_grows_with_c_and_k_and_is_a_probability(nck):
    n, c, k = nck
    assert 0 <= pass_at_k(n, c, k) <= 1
    if c < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c + 1, k) + 1e-15
    if k < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1) + 1e-15


def test_pass_at_k_of_many_samples_is_quick_and_exact():
    began = time.monotonic()
    assert pass_at_k(10**12, 1, 5 * 10**11) == 0.5
    assert pass_at_k(10**12, 5 * 10**11, 5 * 10**11) == 1.0
    assert pass_at_k(200, 1, 100) == 0.5
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("nck", "words"),
    [
        ((5, 2, 6), ("6", "5")),
        ((5, 6, 1), ("6", "5")),
        ((5, -1, 1), ("c must be at least 0",)),
        ((5, 1, 0), ("k must be at least 1",)),
        ((0, 0, 1), ("n must be at least 1",)),
        ((5.0, 1, 1), ("n must be an integer",)),
        ((5, True, 1), ("c must be an integer",)),
    ],
)
def test_pass_at_k_refuses(nck, words):
    with pytest.raises(ParameterError) as error:
        pass_at_k(*nck)
    assert all(word in str(error.value) for word in words)


def test_pass_rates_are_means_over_problems():
    result = pass_rates(["a", "b", "c"], n=[10, 10, 4], c=[3, 0, 4], k=(1, 5))
    assert [entry.index for entry in result.unscored] == [2]
    assert "has 4 samples" in result.unscored[0].reason and "5" in result.unscored[0].reason
    assert result.per_sample == (pass_at_k(10, 3, 1), 0.0, None)
    assert result.value == result.parts["pass@1"] == pytest.approx(0.15)
    assert result.parts["pass@5"] == pytest.approx(pass_at_k(10, 3, 5) / 2)
    assert result.signature == f"pass_at_k|k:1,5|estimator:unbiased|version:kvik-{kvik.__version__}"
    assert pass_rates([], n=[], c=[]).value is None
    assert pass_rates(["a"], n=[1], c=[1], k=1).value == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n": [3, 2], "c": [0, 0], "k": 4}, "pass@4 needs 4 samples a problem, the most is 3"),
        ({"n": [3], "c": [0, 0]}, "2 problems, 1 of n and 2 of c"),
        ({"n": [3, 2], "c": [0, 3]}, "c of problem 1 must be at most n: 3 of 2"),
        ({"n": [3, "2"], "c": [0, 0]}, "n of problem 1"),
        ({"n": [3, 2], "c": [0, 0], "k": ()}, "k must name"),
        ({"n": [3, 2], "c": [0, 0], "k": (1, 0)}, "k must be at least 1"),
    ],
)
def test_pass_rates_refuse(settings, words):
    with pytest.raises(ParameterError, match=words):
        pass_rates(["a", "b"], **settings)


def test_the_metrics_are_in_the_table():
    assert METRICS["pass_at_k"].function is pass_rates
    assert METRICS["execution_accuracy"].function is execution_accuracy


def test_outputs_are_compared_but_for_space_at_ends():
    result = execution_accuracy(["1\n2  \n\n", "1 2", "", "x"], ["1\n2", "1\n2", "\n", ["y", "x"]])
    assert result.per_sample == (1.0, 0.0, 1.0, 1.0)
    assert result.value == 0.75 and result.unscored == () and not result.reasons


def test_programs_are_run_by_what_is_given():
    seen = []

    def run(program):
        seen.append(program)
        return Outcome(error="division by zero") if program.endswith("/0") else Outcome(eval(program))

    result = execution_accuracy(["1+1", "3", "1/0", "2", "5"], ["2", "2", "2", "1/0", ["1/0", "5"]], run=run)
    assert result.per_sample == (1.0, 0.0, 0.0, None, 1.0)
    assert result.reasons == {2: "the program fails: division by zero"}
    assert [(entry.index, entry.reason) for entry in result.unscored] == [(3, "the reference fails: division by zero")]
    assert result.value == 0.5
    assert set(seen) == {"1+1", "2", "3", "1/0", "5"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "shop #1?.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);"
        "INSERT INTO item VALUES (1, 'tea', 3.0), (2, 'cup', 5.5), (3, 'tea', 3.0), (4, 'Ærø', NULL);"
        "INSERT INTO item VALUES (5, CAST(x'ff' AS TEXT), 1), (6, CAST(x'fe' AS TEXT), 1);"
    )
    connection.close()
    return path


def judged(shop, prediction, *golds, **settings):
    result = execution_accuracy([prediction], [list(golds)], database=shop, **settings)
    (score,) = result.per_sample
    return score, result.reasons.get(0) or (result.unscored[0].reason if result.unscored else None)


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("SELECT name FROM item WHERE id < 4 ORDER BY id DESC", "SELECT name FROM item WHERE id < 4", 1),
        ("SELECT DISTINCT name FROM item WHERE id < 4", "SELECT name FROM item WHERE id < 4", 0),
        ("SELECT id FROM item ORDER BY id DESC", "SELECT id FROM item ORDER BY id", 0),
        ("SELECT id FROM item ORDER BY id", "SELECT id FROM item ORDER BY id", 1),
        ("SELECT id AS x FROM item;", "SELECT id FROM item", 1),
        ("SELECT name, id FROM item", "SELECT id, name FROM item", 0),
        ("SELECT 1.0", "SELECT 1", 1),
        ("SELECT '1'", "SELECT 1", 0),
        ("SELECT NULL", "SELECT price FROM item WHERE id = 4", 1),
        ("SELECT 0", "SELECT price FROM item WHERE id = 4", 0),
        ("SELECT name FROM item WHERE id = 6", "SELECT name FROM item WHERE id = 5", 0),
        ("SELECT 1 WHERE 0", "SELECT id, name FROM item WHERE 0", 1),
        ("-- all of them\nSELECT count(*) FROM item", "SELECT 6", 1),
        (
            "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t WHERE x < 3) SELECT max(x) FROM t",
            "SELECT 3",
            1,
        ),
    ],
)
def test_queries_with_the_same_rows_agree(shop, prediction, gold, score):
    assert judged(shop, prediction, gold) == (score, None)


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ("SELEC id FROM item", "syntax error"),
        ("SELECT id FROM items", "no such table: items"),
        ("", "gives no rows"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("DROP TABLE item", "more than read"),
        ("INSERT INTO item VALUES (9, 'x', 1)", "more than read"),
        ("ATTACH DATABASE '/tmp/x.db' AS other", "more than read"),
        ("PRAGMA writable_schema = 1", "more than read"),
        ("VACUUM INTO '/tmp/x.db'", "more than read"),
        ("SELECT load_extension('/tmp/x.so')", "fails"),
        ("CREATE TEMP TABLE t (x)", "more than read"),
        ("BEGIN", "more than read"),
        ("SELECT 1 \0", "zero character"),
        ("SELECT '\ud800'", "Unicode"),
        ("SELECT length(randomblob(2000000000))", "too big"),
        ("SELECT 1 FROM item a, item b, item c, item d, item e, item f, item g", "more than 100000 rows"),
        ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "fails"),
        ("SELECT 1" + " " * 2_000_000, "longer than 1000000 bytes"),
        ("SELECT 'a' LIKE '" + "%a" * 2000 + "'", "LIKE"),
    ],
)
def test_a_query_that_fails_scores_0_and_says_why(shop, prediction, words):
    before = shop.read_bytes()
    score, reason = judged(shop, prediction, "SELECT 1")
    assert score == 0 and words in reason
    assert shop.read_bytes() == before


def test_a_query_without_end_is_stopped(shop):
    endless = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT count(*) FROM t"
    began = time.monotonic()
    assert judged(shop, endless, "SELECT 1", seconds=0.05) == (0, "the query fails: takes longer than 0.05 s")
    assert judged(shop, "SELECT 1", endless, seconds=0.05)[0] is None
    assert time.monotonic() - began < 5


def test_a_reference_that_fails_leaves_the_sample_unscored_unless_another_agrees(shop):
    result = execution_accuracy(
        ["SELECT 1"] * 3, ["SELECT x", ["SELECT x", "SELECT 1"], ["SELECT x", "SELECT 2"]], database=shop
    )
    assert result.per_sample == (None, 1.0, None) and result.value == 1.0
    assert [entry.index for entry in result.unscored] == [0, 2]
    assert "no such column: x" in result.unscored[0].reason


def test_a_database_a_sample(shop, tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE item (id)")
    connection.close()
    queries = ["SELECT count(*) FROM item"] * 2
    assert execution_accuracy(queries, ["SELECT 6", "SELECT 0"], database=[shop, str(other)]).value == 1.0
    with pytest.raises(ParameterError, match="2 predictions and 1 databases"):
        execution_accuracy(queries, queries, database=[shop])


def test_what_cannot_be_asked_is_refused(shop, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.db: no such file"):
        judged(tmp_path / "nothing.db", "SELECT 1", "SELECT 1")
    assert not (tmp_path / "nothing.db").exists()
    broken = tmp_path / "broken.db"
    broken.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(DataError, match=r"broken.db: is no SQLite database"):
        judged(broken, "SELECT 1", "SELECT 1")
    with pytest.raises(ParameterError, match="exclude each other"):
        judged(shop, "SELECT 1", "SELECT 1", run=Outcome)
    with pytest.raises(ParameterError, match="seconds"):
        execution_accuracy(["1"], ["1"], seconds=1.0)
    with pytest.raises(ParameterError, match="seconds must be"):
        judged(shop, "SELECT 1", "SELECT 1", seconds=0.0)
    with pytest.raises(ParameterError, match="2 predictions and 1 references"):
        execution_accuracy(["1", "2"], ["1"], database=shop)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order  -- so\n by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY b LIMIT 3)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'ORDER BY', \"ORDER BY\" FROM t -- ORDER BY a", False),
        ("SELECT [order], `by` FROM t /* ORDER BY */", False),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t WHERE b = 'it''s' ORDER BY a", True),
        ("SELECT reorder, byte FROM t", False),
    ],
)
def test_whether_a_query_orders_its_rows(query, ordered):
    assert has_order(query) is ordered


@given(st.text(alphabet="ORDER BYorderby'\"`[]()-/*\n ab;", max_size=200))
def test_any_text_is_looked_at_in_time(text):
    assert has_order(text) in (True, False)
