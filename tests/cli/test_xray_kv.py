"""`kvik xray --kv`: what evictions did to tokens, told and drawn."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from cli.test_xray import Read

from kvik.cli.xray_kv_events import EARLIER, FIRST, GIVEN_UP, KEPT, LAST, events_of, streamed
from kvik.cli.xray_kv_html import shown_events
from kvik.engine.moving import EvictionRecord
from kvik.params import H2O, KeyDiff, Protected, StreamingLLM

WORDS = " a b c d e f g h i j k l m n o p q r s t u v w x y z" * 4  # 104 tokens
RUN = ("xray", WORDS, "--raw", "--kv", "--max-tokens", "6", "--seed", "3")


def record(tokens, kept, scores, protected=(0, 0)):
    """Of a model of three layers, the middle one with a window of its own, and one head."""
    counts = np.array([[len(kept[0])], [-1], [len(kept[1])]], np.int32)
    slots = np.full((3, 1, max(map(len, kept))), -1, np.int32)
    for layer, own in zip((0, 2), kept, strict=True):
        slots[layer, 0, : len(own)] = own
    held = np.array([[len(row)] for row in scores])
    most = max(map(len, scores))
    padded = np.array([[[*row, *[0] * (most - len(row))]] for row in scores], np.float32)
    return EvictionRecord((0,) * 9, tokens, (0, 2), slots, counts, padded, held, Protected(*protected))


def test_slots_become_tokens_over_several_events():
    first = record(5, [[0, 1, 4], [0, 2, 4]], [[9, 5, 1, 2, 0], [9, 1, 5, 5, 0]], (1, 1))
    second = record(8, [[0, 2, 3], [0, 5]], [[1, 7, 8, 9, 2, 3], [0, 0, 0, 0, 0, 4]])
    one, two = events_of([first, second], KeyDiff())
    assert one.states[:, 0].tolist() == [[FIRST, KEPT, 1, 1, LAST], [FIRST, GIVEN_UP, KEPT, 1, LAST]]
    assert one.ranks[:, 0].tolist() == [[0, 1, 3, 2, 0], [0, 3, 2, 1, 0]]  # of equal ones the later is better
    assert one.keepers.tolist() == [2, 1, 1, 0, 2] and one.counts.tolist() == [[3], [3]] and one.pairs == 2
    # the second event's slots are tokens 0 1 4 5 6 7, and 0 2 4 5 6 7
    assert two.states[:, 0].tolist() == [
        [KEPT, GIVEN_UP, EARLIER, EARLIER, KEPT, KEPT, 1, 1], [KEPT, EARLIER, 1, EARLIER, 1, 1, 1, KEPT],
    ]  # fmt: skip
    assert two.scores[0, 0].tolist()[:2] == [1, 7] and np.isnan(two.scores[0, 0, 2]) and two.scores[0, 0, 4] == 8
    assert two.attention_kept is None


def test_attention_is_a_sum_of_probabilities():
    step = 2.0**24
    (one,) = events_of([record(4, [[0, 3], [1, 3]], [[3 * step, step, 0, 9 * step]] * 2, (0, 1))], H2O())
    assert one.scores[0, 0].tolist() == [3, 1, 0, 9]
    assert one.attention_kept == (3 + 1) / 8  # the last ones do not compete


def test_streaming_is_a_mask():
    event = streamed(StreamingLLM(sinks=2, window=3), (0, 2), 2, 7)
    assert event.states.shape == (2, 2, 7) and event.states[1, 1].tolist() == [FIRST, FIRST, 1, 1, LAST, LAST, LAST]
    assert event.attention_kept is None and not event.ranks.any()


def test_told(kvik, made):
    ended = kvik(*RUN, "--evict", "keydiff:budget=20", "--kv-format", "int8")
    assert ended.code == 0, ended.err
    assert "int8, keydiff:budget=20,every=64" in ended.out and "25 of 109 tokens kept" in ended.out
    assert "event 1, after 104 tokens: 20 kept in each of 2 layers x 1 heads\n" in ended.out
    assert "what half of them keep:" in ended.out and " … " in ended.out and "The sky is blue." in ended.out
    assert made[-1].engine.on_evict is None


def test_json(kvik):
    found = json.loads(kvik(*RUN, "--evict", "h2o:budget=20,recent=0.5", "--json").out)
    (event,) = found["events"]
    assert event["num_tokens"] == 104 and event["layers"] == [0, 1] and event["counts"] == [[20], [20]]
    for head in (head for layer in event["kept"] for head in layer):
        assert len(head) == 20 and head[-10:] == list(range(94, 104))
    assert len(event["kept_for_score"][0][0]) == 10 and sum(event["keepers"]) == 40
    assert (
        found["num_prompt"] == 104
        and len(found["tokens"]) == 109
        and found["cache"]["policy"].startswith("h2o:budget=20")
    )


def test_streaming_told(kvik):
    ended = kvik(*RUN, "--evict", "streamingllm:sinks=4,window=32")
    assert ended.code == 0 and "36 kept in each of 2 layers x 1 heads" in ended.out
    ended = kvik(*RUN, "--evict", "streamingllm")
    assert ended.code == 0 and "nothing was given up" in ended.out


def test_html(kvik, tmp_path):
    path = tmp_path / "kept.html"
    words = WORDS.replace(" z", " </script><b>", 1)
    ended = kvik("xray", words, *RUN[2:], "--evict", "h2o:budget=20,every=2", "--html", str(path))
    assert ended.code == 0 and ended.err == f"{path}: open it in a browser\n"
    page = path.read_text()
    read = Read(page)
    data = json.loads(read.scripts[0])
    assert len(read.scripts) == 2 and "</script><b>" not in page and "␣</script><b>" in data["names"]
    first, second, *_ = data["events"]
    assert (first["n"], second["n"], data["prompt"], first["heads"]) == (104, 106, 104, 1)
    states = np.frombuffer(base64.b64decode(first["states"]), np.uint8).reshape(2, 104)
    assert ((states >= KEPT).sum(1) == 20).all() and (states[:, -10:] == LAST).all()
    ranks = np.frombuffer(base64.b64decode(second["ranks"]), "<u2").reshape(2, 106)
    scores = np.frombuffer(base64.b64decode(second["scores"]), "<u2").reshape(2, 106)
    assert (ranks > 0).sum() == 2 * 12 and (scores != 0x7FC0).sum() >= 2 * 22


def test_pages_of_many_events_have_some(monkeypatch):
    monkeypatch.setattr("kvik.cli.xray_kv_html.MOST_CELLS", 100)
    events = [streamed(StreamingLLM(sinks=1, window=1), (0,), 1, 25)] * 30
    assert shown_events(events) == [0, 10, 19, 29] and shown_events(events[:3]) == [0, 1, 2] and shown_events([]) == []
    assert shown_events([streamed(StreamingLLM(sinks=1, window=1), (0,), 1, 300)] * 2) == [0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "--kv shows what --evict gives up; name a policy"),
        ("--evict none", "--kv shows what --evict gives up"),
        ("--evict h2o --at 2", "--at has no effect with --kv"),
        ("--evict h2o --plot x.png", "--plot has no effect with --kv"),
        ("--evict h2o --beams 2", "--beams has no effect with --kv"),
        ("--evict h2o --kv-format int5", "--kv-format must be one of"),
        ("--evict h2o --kv-group-size 32", "--kv-group-size 32 needs --kv-format int8 or int4"),
    ],
)
def test_refused(kvik, made, given, said):
    ended = kvik("xray", "hi", "--kv", *given.split())
    assert ended.code == 2 and made == [] and ended.err.count("\n") == 1 and said in ended.err


def test_refused_later(kvik, tmp_path):
    ended = kvik("xray", WORDS, "--raw", "--kv", "--evict", "streamingllm", "--html", str(tmp_path / "x.html"))
    assert ended.code == 2 and "--html has nothing to show: nothing was given up in" in ended.err
