"""CodeBLEU against the figures of the package `codebleu`, against its definition, and on code that nobody would write."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvik
from kvik.errors import ParameterError
from kvik.evaluation.metrics import METRICS
from kvik.evaluation.metrics.code_bleu import code_bleu
from kvik.evaluation.metrics.code_bleu.dataflow import data_flow
from kvik.evaluation.metrics.code_bleu.languages import LANGUAGES
from kvik.evaluation.metrics.code_bleu.trees import parse

_FIGURES = json.loads((Path(__file__).parent / "code_bleu_golden.json").read_text(encoding="utf-8"))
GOLDEN, CORPUS = _FIGURES["pairs"], _FIGURES["corpus"]
"""Pairs with the components that the package `codebleu` gives; "source" in the file says which versions."""

PYTHON = """\
def total(values, start=0):
    result = start
    for value in values:
        if value > 0:
            result += value
        else:
            result = result - value
    while result > 100:
        result = result // 2
    return result
"""
JAVA = """\
class Sum {
    int total(int[] values) {
        int result = 0;
        for (int value : values) {
            if (value > 0) { result += value; } else { result = result - value; }
        }
        for (int i = 0; i < 3; i++) { result = result * i; }
        return result;
    }
}
"""
CODE = {"python": PYTHON, "java": JAVA}


def parts(prediction, *references, language="python", **rest):
    return code_bleu([prediction], [list(references)], language=language, **rest).parts


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["language"] + ": " + entry["prediction"][:30])
def test_components_are_those_of_the_official_package(entry):
    found = parts(entry["prediction"], *entry["references"], language=entry["language"])
    for name, expected in entry["components"].items():
        if name == "dataflow" and "dataflow" not in found:
            assert expected == 0  # it has no such component, and says 0
        else:
            assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_a_corpus_adds_counts_before_it_divides():
    pairs = [entry for entry in GOLDEN if entry["language"] == "python"]
    result = code_bleu([p["prediction"] for p in pairs], [p["references"] for p in pairs], language="python")
    expected = CORPUS["python"]
    assert {name: result.parts[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert result.value == pytest.approx(sum(expected.values()) / 4, abs=1e-12)
    alone = [code_bleu([p["prediction"]], [p["references"]], language="python").value for p in pairs]
    assert result.per_sample == pytest.approx(alone, abs=1e-15)


def test_sums_make_the_value_of_any_drawing_of_samples():
    pairs = [entry for entry in GOLDEN if entry["language"] == "java"]
    predictions, references = [p["prediction"] for p in pairs], [p["references"] for p in pairs]
    result = code_bleu(predictions, references, language="java")
    assert METRICS["code_bleu"].pooled == "sums"
    drawn = [0, 3, 3, 5]
    again = code_bleu([predictions[i] for i in drawn], [references[i] for i in drawn], language="java")
    assert result.sums.value(result.sums.counts[drawn].sum(axis=0, keepdims=True)) == pytest.approx(
        [again.value], abs=1e-12
    )
    assert result.sums.value(result.sums.counts.sum(axis=0, keepdims=True))[0] == result.value


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_same_code_is_1_and_names_do_not_count_in_syntax_and_data_flow(language):
    code = CODE[language]
    same = code_bleu([code], [code], language=language)
    assert same.value == same.per_sample[0] == 1.0
    assert same.parts == {"ngram": 1, "weighted_ngram": 1, "syntax": 1, "dataflow": 1, "unparsable": 0}
    renamed = code.replace("result", "zz").replace("values", "aa").replace("total", "f").replace("start", "mm")
    found = parts(renamed, code, language=language)
    assert found["syntax"] == 1.0 and found["dataflow"] == 1.0 and found["ngram"] < 1


NAMES = st.lists(st.sampled_from(["a", "b", "c", "item", "Æ", "x1"]), min_size=2, max_size=3, unique=True)
EXPRESSIONS = st.recursive(
    st.sampled_from(["{0}", "{1}", "1", "'s'"]),
    lambda e: st.tuples(e, st.sampled_from("+*"), e).map(" ".join),
    max_leaves=4,
)
LINES = st.one_of(
    st.builds("{{0}} = {}".format, EXPRESSIONS),
    st.builds("{{1}} += {}".format, EXPRESSIONS),
    st.builds("if {}:\n    {{0}} = {}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("for {{1}} in f({}):\n    {{0}} = {}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("while {}:\n    {{1}} = {}".format, EXPRESSIONS, EXPRESSIONS),
    st.builds("{{0}}, {{1}} = {}, {}".format, EXPRESSIONS, EXPRESSIONS),
)
PROGRAMS = st.lists(LINES, min_size=1, max_size=6).map("\n".join)


@settings(max_examples=25, deadline=None)
@given(PROGRAMS, NAMES, NAMES)
def test_renaming_leaves_syntax_and_data_flow_at_1(program, names, others):
    found = parts(program.format(*names), program.format(*others))
    assert found["syntax"] == 1.0 and found.get("dataflow", 1.0) == 1.0


@settings(max_examples=25, deadline=None)
@given(PROGRAMS, PROGRAMS, NAMES)
def test_values_are_in_range_and_the_mean_of_the_components(one, other, names):
    result = code_bleu([one.format(*names)], [other.format(*names)], language="python", tokens="syntax")
    components = [value for name, value in result.parts.items() if name != "unparsable"]
    assert all(0 <= value <= 1 for value in components)
    assert result.value == pytest.approx(sum(components) / len(components), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80), st.text(max_size=80), st.sampled_from(sorted(LANGUAGES)))
def test_any_text_is_scored_or_said_to_have_no_code(prediction, reference, language):
    result = code_bleu([prediction], [reference], language=language)
    if result.value is None:
        assert result.unscored[0].reason == "its reference has no code"
    else:
        assert 0 <= result.value <= 1


def sexp(code):
    import tree_sitter
    import tree_sitter_python

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language())).parse(code.encode()).root_node


@settings(max_examples=25, deadline=None)
@given(PROGRAMS, PROGRAMS, NAMES)
def test_shapes_are_equal_where_tree_sitter_writes_them_alike(one, other, names):
    shapes = {}
    expected, found = [], []
    for program in (one, other):
        stack, written = [sexp(program.format(*names))], []
        while stack:
            node = stack.pop()
            written.append(str(node))
            stack += [child for child in node.children if child.children]
        expected.append(written)
        found.append(parse(program.format(*names), LANGUAGES["python"].grammar, shapes).shapes)
    assert [shape.total() for shape in found] == [len(written) for written in expected]
    assert sum(n for shape, n in found[1].items() if shape in found[0]) == sum(
        text in expected[0] for text in expected[1]
    )


def flow(code, language="python"):
    spoken = LANGUAGES[language]
    return data_flow(parse(code, spoken.grammar, {}), spoken.rules)


def test_data_flow_of_an_example():
    assert flow("x = y\nz = x") == {
        (1, "computed from", (0,)): 1,  # x of y
        (0, "comes from", ()): 1,  # y
        (2, "computed from", (1,)): 1,  # z of x
        (1, "comes from", (1,)): 1,  # x of the first x
    }
    assert flow("pass") == {}
    assert flow("for x in y:\n    a = x\nelse:\n    b = x") == flow("for q in w:\n    e = q\nelse:\n    r = q")
    assert (3, "computed from", (1,)) in flow("for x in y:\n    a = x\nelse:\n    b = x")


def test_a_value_reaches_past_an_if_unless_there_is_an_else():
    code = "def f(x):\n    if c:\n        x = 2\n{}    return x\n"
    assert flow(code.format("")) == {
        (0, "comes from", ()): 1,  # the parameter, which the last x may come from
        (0, "computed from", (1,)): 1,
        (1, "comes from", ()): 1,  # 2
        (0, "comes from", (0,)): 1,
    }
    assert flow(code.format("    else:\n        x = 3\n")) == {
        (0, "comes from", ()): 1,  # 2: nothing comes from the parameter
        (1, "computed from", (0,)): 1,
        (2, "comes from", ()): 1,  # 3
        (1, "computed from", (2,)): 1,
        (1, "comes from", (1,)): 1,
    }


def test_comments_and_docstrings_are_not_syntax():
    plain = "def f(a):\n    b = a\n    return b\n"
    told = '"""Module."""\n# one\ndef f(a):  # two\n    """Doc."""\n    b = a  # three\n    return b\n'
    found = parts(told, plain)
    assert found["syntax"] == 1.0 and found["dataflow"] == 1.0 and parts(plain, told)["syntax"] == 1.0
    java = parts("int f(int a) { /* b */ return a; // c\n}", "int f(int a) { return a; }", language="java")
    assert java["syntax"] == 1.0 and java["dataflow"] == 1.0
    only = parts('def f():\n    """Doc."""', 'def f():\n    """Other."""')
    assert only["unparsable"] == 0 and only["syntax"] == 1.0
    assert parts('x = "# no comment"', 'x = "y"')["syntax"] == 1.0


def test_text_that_is_not_ascii_is_cut_where_it_ends():
    found = parts("s = 'æøå'; größe = s; x = größe", "s = 'abc'; grosse = s; x = grosse")
    assert found["dataflow"] == 1.0 and found["syntax"] == 1.0


def test_a_reference_without_data_flow_has_no_such_component():
    result = code_bleu(["def f ( ) : pass"], ["def f ( ) : pass"], language="python")
    assert "dataflow" not in result.parts and result.value == 1.0 and result.unscored == ()
    other = code_bleu(["def g ( ) : pass"], ["def f ( ) : pass"], language="python")
    shown = [other.parts[name] for name in ("ngram", "weighted_ngram", "syntax")]
    assert other.value == pytest.approx(sum(shown) / 3, abs=1e-12)
    only = code_bleu(["x = y", "pass"], ["x = y", "pass"], language="python", weights=(0, 0, 0, 1))
    assert only.per_sample == (1.0, None) and only.value == 1.0
    assert [entry.index for entry in only.unscored] == [1] and "no data flow" in only.unscored[0].reason


def test_a_match_of_nothing_is_0():
    found = code_bleu(["", "pass"], ["x = y\nz = x"] * 2, language="python")
    assert found.per_sample[0] == 0.0 and found.parts["dataflow"] == 0.0
    assert found.parts["unparsable"] == 0.0
    assert parts("def f(:", "x = y")["unparsable"] == 1.0


def test_references_that_are_no_code_are_unscored():
    result = code_bleu(["x = 1", "x = 1", "x = 1"], ["", "# nothing", ["x = 1", "  "]], language="python")
    assert result.value is None and result.per_sample == (None, None, None) and result.parts == {}
    assert [entry.reason for entry in result.unscored] == ["its reference has no code"] * 3
    assert code_bleu([], [], language="python").value is None


def test_tokens_may_be_those_of_the_language():
    spaced, dense = "def f ( x ) :\n    return x + 1", "def f(x):\n    return x+1"
    assert parts(dense, spaced)["ngram"] < 0.5
    assert code_bleu([dense], [spaced], language="python", tokens="syntax").value == 1.0


def test_weights_are_shares():
    pair = (["x = y\nz = x"], ["x = y\nz = x + 1"])
    found = code_bleu(*pair, language="python")
    for i, name in enumerate(("ngram", "weighted_ngram", "syntax", "dataflow")):
        weights = np.eye(4)[i] * 3
        assert code_bleu(*pair, language="python", weights=weights.tolist()).value == pytest.approx(found.parts[name])


def test_the_signature_says_how_to_repeat_it():
    signature = code_bleu(["x"], ["x"], language="java", weights=(1, 1, 2, 0)).signature
    assert signature.startswith("code_bleu|language:java|weights:0.25,0.25,0.5,0|tokens:space|tree-sitter:")
    assert "|tree-sitter-java:" in signature and signature.endswith(f"|version:kvik-{kvik.__version__}")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"language": "pyhton"}, "did you mean 'python'"),
        ({"language": "python", "tokens": "spaces"}, "did you mean 'space'"),
        ({"language": "python", "weights": (1, 1, 1)}, "weights must be 4"),
        ({"language": "python", "weights": (1, 1, 1, -1)}, "weight of dataflow"),
        ({"language": "python", "weights": (0, 0, 0, 0)}, "not all be 0"),
    ],
)
def test_wrong_settings_are_refused(rest, words):
    with pytest.raises(ParameterError, match=words):
        code_bleu(["x"], ["x"], **rest)


def test_a_missing_grammar_is_named(monkeypatch):
    from kvik.evaluation.metrics.code_bleu import trees

    trees._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_java", None)
    with pytest.raises(ParameterError, match=r'code_bleu needs tree-sitter-java: pip install "kvik\[eval\]"'):
        code_bleu(["x"], ["x"], language="java")
    trees._parser.cache_clear()


HOSTILE = {
    "parentheses": "x = " + "(" * 10_000 + "1" + ")" * 10_000,
    "open": "(" * 30_000,
    "nots": "x = " + "not " * 10_000 + "y",
    "chain": "a = " * 5_000 + "1",
    "generics": "A<" * 2_000,
    "ifs": "".join(" " * i + "if a:\n" for i in range(300)) + " " * 300 + "b = a",
    "loops": "".join(" " * i + f"for v{i} in range(n):\n" for i in range(60)) + " " * 60 + "b = v0",
    "quotes": '"""' * 3_000,
    "zeros": "\0" * 10_000,
    "escapes": "\\\n" * 2_000,
    "surrogate": "x = '\ud800'",
    "long": "x = 1\n" * 20_000,
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_ends_in_time(name, language):
    began = time.monotonic()
    result = code_bleu([HOSTILE[name]], [CODE[language]], language=language)
    assert time.monotonic() - began < 20
    assert result.value is not None or result.unscored[0].reason.startswith(("has code of more", "its data flow takes"))
