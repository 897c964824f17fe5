"""The statistics and tables of bench/, on figures whose answers are known."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import BenchError
from bench.common import (
    Interval,
    Target,
    Verdict,
    block_orders,
    bootstrap_median,
    first_output,
    foreign_process,
    markdown_table,
    number,
    paired_ratios,
    run_child,
    verdict,
    verdict_table,
)
from bench.model_bytes import ModelBytes, from_file
from bench.peers import Peers, chosen
from bench.quality import FIRST, ROWS, WINDOW, LlamaSaved, Quality, compare, divergence, log_softmax
from bench.random_gguf import BLOCK, LEVELS_STD, SHAPES, q4_1_tensor, tensors
from bench.report import equal_quality, report, speed_table, verdicts
from bench.results import Results
from bench.setup_peers import with_needs
from kvik.weights.dequantize import dequantize
from kvik.weights.ggml_types import GGMLType

NAMES = ["kvik", "llama.cpp Q4_1 fa=0", "openvino", "transformers"]


class TestBlocks:
    def test_every_block_has_every_name_once(self) -> None:
        orders = block_orders(NAMES, 10, seed=1)
        assert len(orders) == 10
        assert all(sorted(order) == sorted(NAMES) for order in orders)

    def test_orders_differ_and_the_seed_repeats_them(self) -> None:
        orders = block_orders(NAMES, 10, seed=1)
        assert len({tuple(order) for order in orders}) > 3
        assert orders == block_orders(NAMES, 10, seed=1)
        assert orders != block_orders(NAMES, 10, seed=2)

    def test_every_name_comes_first_about_equally_often(self) -> None:
        first = [order[0] for order in block_orders(NAMES, 4000, seed=3)]
        assert all(900 < first.count(name) < 1100 for name in NAMES)

    def test_refusals(self) -> None:
        with pytest.raises(BenchError, match="--blocks must be at least 1"):
            block_orders(NAMES, 0, seed=0)
        with pytest.raises(BenchError, match="twice"):
            block_orders(["a", "a"], 1, seed=0)


class TestBootstrap:
    def test_holds_the_median_and_is_repeatable(self) -> None:
        values = [2.0, 2.1, 1.9, 2.2, 2.05, 1.95, 2.15, 2.0, 1.85, 2.3]
        found = bootstrap_median(values)
        assert found.median == pytest.approx(2.025)
        assert min(values) <= found.low < found.median < found.high <= max(values)
        assert found == bootstrap_median(values)

    def test_scales_with_the_values(self) -> None:
        values = np.array([1.0, 3.0, 2.0, 5.0, 4.0])
        assert np.allclose(bootstrap_median(list(3 * values)), 3 * np.array(bootstrap_median(list(values))))

    def test_covers_the_true_median_nine_times_in_ten(self) -> None:
        rng = np.random.default_rng(0)
        inside = 0
        for trial in range(300):
            low, high = bootstrap_median(list(rng.lognormal(0.0, 0.3, 10)), seed=trial, resamples=500)[1:]
            inside += low <= 1.0 <= high
        assert inside / 300 > 0.88

    def test_one_bad_block_does_not_move_the_median_far(self) -> None:
        assert bootstrap_median([2.0] * 9 + [200.0]).median == 2.0

    def test_single_value_has_no_width(self) -> None:
        assert bootstrap_median([1.5]) == Interval(1.5, 1.5, 1.5)

    @pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
    def test_refusals(self, values: list[float]) -> None:
        with pytest.raises(BenchError, match="finite"):
            bootstrap_median(values)


class TestRatiosAndTargets:
    def test_ratios_pair_the_same_block(self) -> None:
        ours, theirs = {2: 30.0, 0: 10.0, 1: 20.0}, {0: 5.0, 2: 10.0, 7: 1.0}
        assert paired_ratios(ours, theirs) == [2.0, 3.0]

    def test_a_slow_block_slows_both_and_the_ratio_stays(self) -> None:
        speed = np.random.default_rng(1).uniform(0.3, 1.0, 10)
        ours = {block: 300 * s for block, s in enumerate(speed)}
        theirs = {block: 100 * s for block, s in enumerate(speed)}
        found = bootstrap_median(paired_ratios(ours, theirs))
        assert found.high - found.low < 1e-9 and found.median == pytest.approx(3.0)

    def test_division_by_zero_names_the_block(self) -> None:
        with pytest.raises(BenchError, match="block 4"):
            paired_ratios({4: 1.0}, {4: 0.0})

    def test_the_end_of_the_interval_decides(self) -> None:
        above = Target("speed", 2.0)
        assert above.met(Interval(2.5, 2.0, 3.0)) and not above.met(Interval(2.5, 1.99, 3.0))
        below = Target("time", 0.45, "at most")
        assert below.met(Interval(0.4, 0.3, 0.45)) and not below.met(Interval(0.4, 0.3, 0.46))

    def test_table_says_met_missed_and_not_measured(self) -> None:
        table = verdict_table(
            [
                verdict(Target("a", 2.0, unit="×"), [3.0, 3.1, 2.9]),
                verdict(Target("b", 0.45, "at most", " s"), [0.5, 0.6]),
                Verdict(Target("c", 1.0), None, 0, "no peer"),
            ]
        )
        lines = table.splitlines()[2:]
        assert "| met |" in lines[0] and "≥ 2.00×" in lines[0]
        assert "**missed**" in lines[1] and "≤ 0.45 s" in lines[1]
        assert "not measured" in lines[2] and "no peer" in lines[2]


class TestText:
    def test_table(self) -> None:
        assert markdown_table(["a", "b"], [["1", "x|y"]]).splitlines() == [
            "| a | b |",
            "| --- | --- |",
            "| 1 | x\\|y |",
        ]
        with pytest.raises(BenchError, match="1 cells under 2 headings"):
            markdown_table(["a", "b"], [["1"]])

    @pytest.mark.parametrize(
        ("value", "text"), [(1234.5, "1234"), (12.34, "12.3"), (0.456, "0.46"), (0.00123, "0.00123"), (0.0, "0")]
    )
    def test_numbers(self, value: float, text: str) -> None:
        assert number(value) == text

    def test_choosing(self) -> None:
        names = ["kvik", "llama.cpp Q4_1 fa=0", "llama.cpp Q4_0 fa=0", "start kvik"]
        assert chosen(names, None, None) == names
        assert chosen(names, "llama.cpp,kvik", "llama.cpp Q4_0") == ["kvik", "llama.cpp Q4_1 fa=0"]
        with pytest.raises(BenchError, match="there is no 'lama'"):
            chosen(names, "lama", None)

    def test_a_missing_peer_is_one_line_with_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(BenchError, match=r"llama-bench is missing: run `python3 bench/setup_peers.py .*llama.cpp`"):
            Peers(tmp_path).llama("llama-bench")

    def test_steps_bring_what_they_need(self) -> None:
        steps = ["tools", "bandwidth", "llama.cpp", "models", "openvino", "transformers", "sizes"]
        assert with_needs(steps, ["transformers"]) == ["llama.cpp", "models", "transformers"]
        assert with_needs(steps, ["openvino"]) == ["openvino"]


class TestChildren:
    def test_output_time_and_memory(self) -> None:
        hold = "import time; x = bytearray(150 << 20); print('done'); time.sleep(0.2)"
        found = run_child([sys.executable, "-c", hold])
        assert found.stdout == "done\n" and found.seconds > 0.2
        assert found.peak_rss_bytes > 150 << 20

    def test_failure_is_told_with_the_last_line(self) -> None:
        with pytest.raises(BenchError, match="ended with 3: the reason"):
            run_child([sys.executable, "-c", "import sys; print('x\\nthe reason', file=sys.stderr); sys.exit(3)"])
        with pytest.raises(BenchError, match="cannot start /nowhere"):
            run_child(["/nowhere/program"])

    def test_timeout_ends_the_child(self) -> None:
        begun = time.perf_counter()
        with pytest.raises(BenchError, match=r"did not end within 0.3 s"):
            run_child([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.3)
        assert time.perf_counter() - begun < 30

    def test_first_output_skips_white_space(self) -> None:
        code = (
            "import time; print(' ', flush=True); time.sleep(0.3); print('A', flush=True); time.sleep(0.3); print('B')"
        )
        begun = time.perf_counter()
        found = first_output([sys.executable, "-c", code])
        whole = time.perf_counter() - begun
        assert found.text.split() == ["A", "B"]
        assert 0.3 <= found.seconds <= whole - 0.15  # the rest takes 0.3, and noticing takes time

    def test_first_output_wants_output(self) -> None:
        with pytest.raises(BenchError, match="no output"):
            first_output([sys.executable, "-c", "pass"])

    def test_foreign_process_uses_a_core_and_goes(self) -> None:
        def ticks(pid: int) -> int:  # user time, in hundredths of a second
            return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11])

        with foreign_process(sys.executable) as pid:
            first, deadline = ticks(pid), time.perf_counter() + 20
            while ticks(pid) < first + 10 and time.perf_counter() < deadline:
                time.sleep(0.05)
            assert ticks(pid) >= first + 10
        assert not Path(f"/proc/{pid}").exists()


class TestQuality:
    def test_kl_of_two_known_distributions(self) -> None:
        p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
        wanted = 0.5 * np.log(2) + 0.25 * np.log(0.5)
        assert divergence(np.log(p), np.log(q)) == pytest.approx([wanted])
        assert divergence(np.log(p), np.log(p)) == pytest.approx([0.0], abs=1e-15)

    def test_log_softmax(self) -> None:
        logits = np.random.default_rng(0).normal(0, 5, (3, 50)).astype(np.float32) + 1000
        assert np.exp(log_softmax(logits)).sum(axis=1) == pytest.approx([1, 1, 1])

    def test_what_llama_cpp_cuts_adds_no_bias(self) -> None:
        rng = np.random.default_rng(1)
        p = log_softmax(rng.normal(0, 6, (20, 5000)).astype(np.float32))
        cut = np.where(p < p.max(axis=1, keepdims=True) - 16, -np.inf, p)
        assert np.isinf(cut).any()
        assert divergence(p, cut) == pytest.approx(np.zeros(20), abs=1e-12)
        other = log_softmax((p + rng.normal(0, 0.1, p.shape)).astype(np.float32))
        whole = divergence(p, other)
        cut_other = np.where(other < other.max(axis=1, keepdims=True) - 16, -np.inf, other)
        assert divergence(p, cut_other) == pytest.approx(whole, rel=0.02)

    def test_compare_sums_up_the_windows(self) -> None:
        rng = np.random.default_rng(2)
        base = [log_softmax(rng.normal(0, 2, (ROWS, 40)).astype(np.float32)) for _ in range(2)]
        targets = rng.integers(0, 40, (2, ROWS))
        same = compare(iter(base), iter(base), targets)
        assert same.tokens == 2 * ROWS and same.kl == pytest.approx(0, abs=1e-14) and same.same_best == 1.0
        assert same.perplexity == pytest.approx(same.base_perplexity)
        uniform = [np.full((ROWS, 40), -np.log(40.0)) for _ in range(2)]
        assert compare(iter(base), iter(uniform), targets).perplexity == pytest.approx(40.0)

    def test_reads_what_llama_perplexity_writes(self, tmp_path: Path) -> None:
        rng, vocabulary = np.random.default_rng(3), 33
        logs = log_softmax(rng.normal(0, 2, (2 * ROWS, vocabulary)).astype(np.float32))
        lowest = logs.min(axis=1)
        scale = (logs.max(axis=1) - lowest) / 65535
        numbers = np.rint((logs - lowest[:, None]) / scale[:, None]).astype(np.uint16)
        head = np.stack([scale, lowest], axis=1).astype(np.float32).view(np.uint16)
        pad = np.zeros((2 * ROWS, 1), np.uint16)
        tokens = rng.integers(0, vocabulary, (2, WINDOW)).astype(np.int32)
        path = tmp_path / "saved"
        header = b"_logits_" + np.array([WINDOW, vocabulary, 2], np.int32).tobytes() + tokens.tobytes()
        path.write_bytes(header + np.concatenate([head, numbers, pad], axis=1).tobytes())
        saved = LlamaSaved(path)
        assert (saved.vocabulary, saved.windows) == (vocabulary, 2)
        assert np.array_equal(saved.tokens, tokens) and FIRST + ROWS == WINDOW - 1
        found = np.concatenate(list(saved.log_probabilities()))
        assert np.isinf(found).sum() == 2 * ROWS  # the lowest of each row cannot be told from what was cut
        known = np.isfinite(found)
        assert np.abs(found - logs)[known].max() < 2e-4

    def test_refuses_another_file(self, tmp_path: Path) -> None:
        path = tmp_path / "other"
        path.write_bytes(b"x" * 100)
        with pytest.raises(BenchError, match="not what llama-perplexity writes"):
            LlamaSaved(path)


def results(**speeds: float) -> Results:
    """Three blocks of Kvik at 300 and peers at the given speeds; quality as in the names."""
    found = Results(model=ModelBytes(weights=100_000_000, read=100_000_000, kv_token=1000), tokens=1000)
    step = {"step_matrices_ms": 9.0, "step_attention_ms": 0.5, "step_rest_ms": 0.3, "step_python_ms": 0.2}
    for block, speed in enumerate((1.0, 0.5, 0.8)):
        kvik = {
            "decode": 300 * speed,
            "prefill": 3000 * speed,
            "read_gb_s": 45 * speed,
            "own_bandwidth_gb_s": 50 * speed,
        }
        found.figures.setdefault("kvik", {})[block] = {**kvik, **step, "peak_rss_bytes": 201_000_000.0}
        found.figures.setdefault("bandwidth", {})[block] = {"gb_s": 50 * speed, "median_gb_s": 48 * speed}
        for name, rate in speeds.items():
            peer = f"llama.cpp {name} fa=0"
            found.figures.setdefault(peer, {})[block] = {"decode": rate * speed, "prefill": 10 * rate * speed}

    def quality(kl: float) -> Quality:
        return Quality(kl=kl, kl_error=0.0, perplexity=12.0, base_perplexity=12.0, same_best=1.0, tokens=2040)

    found.quality = {"kvik": quality(0.0014), "llama.cpp Q4_1 fa=0": quality(0.003)}
    found.quality |= {"llama.cpp BF16 fa=0": quality(0.0001), "llama.cpp Q4_0 fa=0": quality(0.26)}
    return found


class TestReport:
    def test_only_equal_quality_counts(self) -> None:
        found = results(Q4_1=150.0, BF16=100.0, Q4_0=200.0)
        assert [equal_quality(found, f"llama.cpp {name} fa=0") for name in ("Q4_1", "BF16", "Q4_0")] == [
            False,
            True,
            False,
        ]
        answers = {item.target.text: item for item in verdicts(found)}
        assert answers["decode ÷ llama.cpp, same file"].found == pytest.approx((2.0, 2.0, 2.0))
        equal = answers["decode ÷ llama.cpp's fastest of equal quality"]
        assert equal.note == "llama.cpp BF16 fa=0" and equal.found == pytest.approx((3.0, 3.0, 3.0))
        close = answers["decode ÷ llama.cpp's fastest with KL ≤ 0.01"]
        assert close.note == "llama.cpp Q4_1 fa=0" and close.found == pytest.approx((2.0, 2.0, 2.0))
        assert answers["prefill ÷ OpenVINO, same file"].found is None

    def test_shares_and_memory(self) -> None:
        answers = {item.target.text: item for item in verdicts(results(Q4_1=150.0))}
        share = answers["read bandwidth inside the matrices ÷ bench/bandwidth.c"]
        assert share.found == pytest.approx((0.9, 0.9, 0.9)) and share.target.met(share.found)
        rest = answers["share of a step that is not matrices"]
        assert rest.found == pytest.approx((0.1, 0.1, 0.1))
        memory = answers["peak memory over weights + KV"]
        assert memory.found == pytest.approx((100.0, 100.0, 100.0)) and "weights 100 MB" in memory.note

    def test_without_quality_nothing_is_guessed(self) -> None:
        found = results(Q4_1=150.0)
        found.quality = {}
        answers = {item.target.text: item for item in verdicts(found)}
        assert answers["decode ÷ llama.cpp's fastest of equal quality"].found is None
        assert "| llama.cpp Q4_1 fa=0 |" in speed_table(found)

    def test_whole_report_names_failures(self) -> None:
        found = results(Q4_1=150.0)
        found.failures = {"openvino Q4_1 PA": ["it broke\nand more"]}
        text = report(found)
        assert "| openvino Q4_1 PA | 1 | it broke |" in text and "| matrices |" in text and "90.0 %" in text


class TestModelBytes:
    @pytest.mark.parametrize("tied", [True, False])
    def test_of_a_small_file(self, tmp_path: Path, tied: bool) -> None:
        path = tmp_path / "small.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(3)
        writer.add_embedding_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        for name in ("token_embd.weight", "blk.0.attn_q.weight", *(() if tied else ("output.weight",))):
            writer.add_tensor(name, np.ones((10, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        table = 10 * 64 * 4
        found = from_file(path)
        assert (found.weights, found.read) == ((2 * table, 2 * table) if tied else (3 * table, 2 * table))
        assert found.kv_token == 3 * 2 * 16 * 2 * 2


class TestRandomModels:
    def test_blocks_are_valid_and_of_the_wanted_scale(self) -> None:
        data = q4_1_tensor(np.random.default_rng(0), 256, 512)
        weights = dequantize(data.reshape(-1), GGMLType.Q4_1, (256, 512))
        assert np.isfinite(weights).all()
        assert weights.std() == pytest.approx(512**-0.5, rel=0.05)
        assert abs(weights.mean()) < 0.01 * weights.std() + 1e-4
        assert pytest.approx(4.61, abs=0.01) == LEVELS_STD

    @pytest.mark.parametrize(("size", "billions"), [("1B", 1.24), ("4B", 3.9), ("8B", 8.03)])
    def test_sizes(self, size: str, billions: float) -> None:
        layout = dict(tensors(SHAPES[size]))
        assert sum(int(np.prod(dims)) for dims in layout.values()) == pytest.approx(billions * 1e9, rel=0.02)
        assert all(len(dims) == 1 or dims[1] % BLOCK == 0 for dims in layout.values())
        assert ("output.weight" in layout) == (not SHAPES[size].tied)
