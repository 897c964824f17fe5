from __future__ import annotations

import json

import pytest
from scipy import stats

PERPLEXITY, LONGPPL, SCORE = [9.0, 11.0, 10.0, 12.0, 9.5], [3.0, 4.0, 6.0, 8.0, 5.0], [0.9, 0.8, 0.55, 0.3, 0.7]


@pytest.fixture
def lines() -> list[dict]:
    return [
        {"setting": f"s{i}", "perplexity": one, "longppl": two, "score": score, "other": "x"}
        for i, (one, two, score) in enumerate(zip(PERPLEXITY, LONGPPL, SCORE, strict=True))
    ]


@pytest.fixture
def file(tmp_path):
    def write(lines: list[dict]) -> str:
        path = tmp_path / "settings.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def test_table(kvik, file, lines):
    ended = kvik("eval", "correlate", file(lines))
    assert ended.code == 0, ended.err
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0] == ["with", "score:"] and rows[2][:3] == ["measure", "settings", "Pearson"]
    for row, values in ((rows[3], PERPLEXITY), (rows[4], LONGPPL)):
        assert row[1:3] == ["5", f"{stats.pearsonr(values, SCORE).statistic:.4f}"]
        assert row[6] == f"{stats.spearmanr(values, SCORE).statistic:.4f}"


def test_json_csv_and_other_columns(kvik, file, lines, tmp_path):
    path = tmp_path / "settings.csv"
    path.write_text('name, kl,ruler\r\n7,1,0.5\r\n"b,c",2,0.4\r\nd,,0.3\r\ne,4,0.1\r\n')
    ended = kvik("eval", "correlate", str(path), "--setting", "name", "--measures", "kl", "--score", "ruler", "--json")
    report = json.loads(ended.out)
    (found,) = report["correlations"]
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr([1, 2, 4], [0.5, 0.4, 0.1]).statistic)
    assert found["left_out"] == ["d"] and [one["name"] for one in report["settings"]] == ["7", "b,c", "d", "e"]
    lines[2]["longppl"] = None
    text = kvik("eval", "correlate", file(lines)).out
    assert "longppl: left out, as one of the two was not measured: s2" in text


def test_standard_input_and_a_constant(kvik, lines):
    data = "".join(json.dumps({**line, "perplexity": 7}) + "\n" for line in lines).encode()
    ended = kvik("eval", "correlate", "-", stdin=data)
    assert ended.code == 0 and "perplexity is the same in all settings: no correlation is defined" in ended.out


def test_help_says_whose_figures_the_guide_s_are(kvik):
    text = " ".join(kvik("eval", "correlate", "--help").out.split())
    assert "about 0.2 for perplexity and -0.96 for LongPPL, are those of the paper" in text


def test_picture(kvik, file, lines, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "c.svg"
    lines[0]["longppl"] = None
    ended = kvik("eval", "correlate", file(lines), "--plot", str(path))
    assert ended.code == 0 and path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1].pop("score"), "line 2 has no 'score': a column must be one of setting, perplexity"),
        (lambda lines: lines[1].update(score="0.5"), "line 2 needs a number as 'score', got \"0.5\""),
        (lambda lines: lines[1].update(score=True), "line 2 needs a number as 'score', got true"),
        (lambda lines: lines[3].update(setting="s0"), 'line 4 has the setting "s0" of line 1 again'),
        (lambda lines: lines[3].update(setting=""), "line 4 needs a name as 'setting'"),
        (lambda lines: lines[0].update(longppl=10**400), "line 1 needs a number as 'longppl'"),
    ],
)
def test_lines_that_do_not_fit(kvik, file, lines, change, said):
    change(lines)
    ended = kvik("eval", "correlate", file(lines))
    assert ended.code == 65 and said in ended.err and "settings.jsonl" in ended.err and ended.out == ""


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"setting": "a"\n', "line 1 is not JSON"), ("a.jsonl", b"\xff", "is not UTF-8"),
        ("a.csv", b"setting,perplexity,longppl,score\na,1,2\n", "line 2 has 3 cells, the header 4"),
        ("a.csv", b"setting,perplexity,longppl,score\na,1,2,inf\n", "line 2 needs a finite number as 'score'"),
        ("a.csv", b"setting,perplexity,longppl,score\na,1,2,x\n", "line 2 needs a number as 'score', got \"x\""),
        ("a.csv", b'setting,score\n"a,1\n', "is not CSV"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(kvik, tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    ended = kvik("eval", "correlate", str(path))
    assert ended.code == 65 and said in ended.err and name in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--measures", "kl,"], "--measures takes different names"), (["--measures", "kl,kl"], "--measures takes"),
        (["--measures", "score"], "--score and --measures are both 'score'"), (["--plot", "x.gif"], "--plot writes"),
    ],
)  # fmt: skip
def test_wrong_usage(kvik, file, lines, arguments, said):
    ended = kvik("eval", "correlate", file(lines), *arguments)
    assert ended.code == 2 and said in ended.err


def test_too_few_settings(kvik, file, lines):
    ended = kvik("eval", "correlate", file(lines[:2]))
    assert ended.code == 65 and "needs at least 3 settings, got 2" in ended.err
