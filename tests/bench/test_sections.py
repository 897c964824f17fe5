"""The report's sections on other files and on loading, on figures whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import loading, same_file
from bench.report import report
from bench.results import Results


def speeds(**rates: tuple[float, float]) -> Results:
    """Three blocks; decode and prefill by job, "_" for a space and "=" in its name."""
    found = Results()
    for block, speed in enumerate((1.0, 0.5, 0.8)):
        for name, (decode, prefill) in rates.items():
            figures = {"decode": decode * speed, "prefill": prefill * speed, "peak_rss_bytes": 9e8}
            found.figures.setdefault(JOBS[name], {})[block] = figures
    return found


JOBS = {
    "bf16": "bf16 kvik", "bf16_plain": "llama.cpp BF16 fa=0", "bf16_flash": "llama.cpp BF16 fa=1",
    "q4": "q4_k_m kvik", "q4_plain": "q4_k_m llama.cpp fa=0", "q4_flash": "q4_k_m llama.cpp fa=1",
}  # fmt: skip


def test_each_phase_is_compared_with_llama_cpp_at_its_best() -> None:
    found = speeds(q4=(36, 300), q4_plain=(30, 100), q4_flash=(20, 150), bf16=(100, 100), bf16_plain=(100, 50))
    answers = {item.target.text: item for item in same_file.verdicts(found)}
    decode, prefill = answers["decode ÷ llama.cpp, q4_k_m"], answers["prefill ÷ llama.cpp, q4_k_m"]
    assert decode.found == pytest.approx((1.2, 1.2, 1.2)) and decode.note == "q4_k_m llama.cpp fa=0"
    assert prefill.found == pytest.approx((2.0, 2.0, 2.0)) and prefill.note == "q4_k_m llama.cpp fa=1"
    assert (decode.target.bound, prefill.target.bound) == (1.2, 1.5)
    assert not answers["decode ÷ llama.cpp, bf16"].target.met(answers["decode ÷ llama.cpp, bf16"].found)
    text = same_file.table(found)
    assert (
        "| q4_k_m llama.cpp fa=0 | 24.0 (15.0–30.0) | 1.20 (1.20–1.20) | 80.0 (50.0–100) | 3.00 (3.00–3.00) | 900 |"
        in text
    )
    assert "| bf16 kvik | 80.0 (50.0–100) | – |" in text and "llama.cpp BF16 fa=1" not in text


def test_without_a_peer_nothing_is_guessed() -> None:
    answers = same_file.verdicts(speeds(bf16=(100, 100)))
    assert [item.found for item in answers] == [None, None] and "not measured" in answers[0].note
    assert same_file.verdicts(speeds(bf16_plain=(1, 1))) == []


def loads() -> Results:
    found = Results()
    for block, slow in enumerate((1.0, 2.0, 1.5)):
        found.figures.setdefault("load bf16", {})[block] = {
            "pack_s": 2 * slow, "pack_peak_bytes": 469e6, "over_file_mb": 200.0 + block, "load_s": 0.12 * slow,
            "weights_s": 0.11 * slow, "read_s": 0.05 * slow, "read_whole_s": 0.1 * slow,
        }  # fmt: skip
    return found


def test_loading_is_compared_with_both_ways_of_reading() -> None:
    answers = {item.target.text: item for item in loading.verdicts(loads())}
    whole = answers["loading the weights ÷ reading the packed file into memory, bf16"]
    least = answers["loading the weights ÷ reading the packed file 1 MiB at a time, bf16"]
    assert whole.found == pytest.approx((1.1, 1.1, 1.1)) and whole.target.met(whole.found)
    assert least.found == pytest.approx((2.2, 2.2, 2.2)) and not least.target.met(least.found)
    peak = answers["peak memory of packing over the file, bf16"]
    assert peak.found == pytest.approx((201, 200, 202)) and peak.target.met(peak.found)
    assert "| bf16 | 3.00 (2.00–4.00) |" in loading.table(loads()) and "| 469 |" in loading.table(loads())


def test_the_whole_report_has_both_sections_only_where_they_were_measured() -> None:
    found = speeds(q4=(36, 300), q4_plain=(30, 100))
    found.figures |= loads().figures
    text = report(found)
    assert (
        "## Other files" in text and "## Loading" in text and "| decode ÷ llama.cpp, q4_k_m | 1.20× | 1.20× |" in text
    )
    bare = report(Results())
    assert "## Other files" not in bare and "## Loading" not in bare
