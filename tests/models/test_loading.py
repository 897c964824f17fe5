"""From a file to a model: what the store keeps of it, damaged or refused."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest

import kvik
from kvik.models.facts import read_facts
from kvik.models.loading import load_model
from kvik.weights.store import ModelStore

TOKENS = [*map(chr, range(33, 127)), "Ġ", "ab", "<s>", "</s>"]
GREEDY = kvik.SamplingParams(max_tokens=4, temperature=0.0)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "store"))


def write_model(path, *, head_size=16, merge="a b", more=(), about=(), **sampling):
    """A model of one layer with random weights; more: tensors beside its own; about: texts by key; sampling: its own generation defaults."""
    hidden, rows = 2 * head_size, np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 96 + [3, 3])
    writer.add_token_merges([merge])
    writer.add_bos_token_id(96)
    writer.add_eos_token_id(97)
    for key, text in dict(about).items():
        writer.add_string(key, text)
    for name, value in sampling.items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{name}", value)
    shapes = {
        "token_embd": (98, hidden), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (head_size, hidden),
        "blk.0.attn_v": (head_size, hidden), "blk.0.attn_output": (hidden, hidden), "blk.0.ffn_gate": (32, hidden),
        "blk.0.ffn_up": (32, hidden), "blk.0.ffn_down": (hidden, 32),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", rows.standard_normal(shape).astype(np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm", *more):
        writer.add_tensor(name + ".weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def answer(path):
    llm = kvik.LLM(path, engine=kvik.EngineParams(threads=1))
    return llm.generate([[1, 2, 3]], GREEDY)[0].choices[0].token_ids


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model.json", '"num_layers": 1', '"num_layers": 2'),
        ("model.json", '"theta": 10000.0', '"theta": 10000.5'),
        ("model.json", '"family": "llama"', '"family": "mlama"'),
        ("model.json", '"parameters"', '"perameters"'),
        ("model.json", "{", "["),
        ("tokenizer/kvik_tokenizer.json", '"bos_id": 96', '"bos_id": 95'),
        ("tokenizer/kvik_tokenizer.json", '"format"', '"fermat"'),
    ],
)
def test_what_the_store_keeps_is_made_again_when_damaged(tmp_path, file, old, new) -> None:
    path = write_model(tmp_path / "m.gguf")
    expected = answer(path)
    kept = ModelStore().folder_for(path) / file
    whole = kept.read_text()
    assert old in whole
    kept.write_text(whole.replace(old, new, 1))
    assert answer(path) == expected
    assert kept.read_text() == whole


def test_a_refused_file_leaves_nothing_in_the_store(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(kvik.DataError):
        kvik.LLM(path)
    assert ModelStore().list() == []


def test_a_first_start_that_fails_leaves_nothing_in_the_store(tmp_path, monkeypatch) -> None:
    path = write_model(tmp_path / "m.gguf")

    def full(*_: object) -> None:
        raise kvik.StorageError("no space left")

    with monkeypatch.context() as m:
        m.setattr("kvik.models.loading.save_json", full)
        with pytest.raises(kvik.StorageError):
            kvik.LLM(path)
    assert not list((tmp_path / "store" / "packed").iterdir())
    with monkeypatch.context() as m:
        m.setattr("kvik.models.loading.load_packed", full)
        with pytest.raises(kvik.StorageError):
            kvik.LLM(path)
    assert ModelStore().list() == []
    answer(path)
    before = sorted(ModelStore().folder_for(path).rglob("*"))
    with monkeypatch.context() as m:
        m.setattr("kvik.models.loading.load_packed", full)
        with pytest.raises(kvik.StorageError):
            kvik.LLM(path, weights="int8")
    assert sorted(ModelStore().folder_for(path).rglob("*")) == before


@pytest.mark.parametrize("name", ["model.json", "tokenizer/kvik_tokenizer.json", "tokenizer/kvik_tokenizer.bin"])
def test_a_folder_in_place_of_a_file_of_the_store_is_made_again(tmp_path, name) -> None:
    path = write_model(tmp_path / "m.gguf")
    expected = answer(path)
    kept = ModelStore().folder_for(path) / name
    whole = kept.read_bytes()
    kept.unlink()
    (kept / "inner").mkdir(parents=True)
    assert answer(path) == expected and kept.read_bytes() == whole


def test_a_file_in_place_of_the_tokenizer_s_folder(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf")
    expected = answer(path)
    kept = ModelStore().folder_for(path) / "tokenizer"
    kept.rename(tmp_path / "away")
    kept.write_text("x")
    assert answer(path) == expected


def test_names_and_licences_steer_no_terminal(tmp_path) -> None:
    about = {"general.name": "a\x1b[2Jb", "general.license": "mit\r\n\x9b"}
    loaded = load_model(write_model(tmp_path / "m.gguf", about=about), "auto", lambda *_: None)
    assert (loaded.name, loaded.license) == (r"a\x1b[2Jb", r"mit\r\n\x9b")
    refused = write_model(tmp_path / "n.gguf", about=about, more=("blk.9.attn_norm",))
    facts = read_facts(refused, "auto")
    assert facts.refused and (facts.name, facts.license) == (r"a\x1b[2Jb", r"mit\r\n\x9b")


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm", "blk.1.attn_norm", "token_embd_norm"])
def test_tensors_that_would_be_ignored_are_refused(tmp_path, name) -> None:
    path = write_model(tmp_path / "m.gguf", more=(name,))
    with pytest.raises(kvik.DataError, match="has no place in a llama model of 1 layers") as caught:
        kvik.LLM(path)
    assert caught.value.tensor == f"{name}.weight" and caught.value.offset is not None
    assert ModelStore().list() == []


def test_a_refused_tokenizer_names_the_file(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf", merge="a q")
    with pytest.raises(kvik.DataError, match=r"m\.gguf: tokenizer\.ggml\.merges\[0\]"):
        kvik.LLM(path)


def test_the_file_s_own_generation_defaults(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf", temp=0.5, top_k=-1)
    assert dict(load_model(path, "auto", lambda *_: None).defaults) == {"temperature": 0.5, "top_k": 0}
    path = write_model(tmp_path / "n.gguf", top_p=2.0)
    with pytest.raises(kvik.DataError, match=r"n\.gguf: general\.sampling\.top_p: top_p must be finite and in"):
        kvik.LLM(path)


def test_sizes_the_native_executor_lacks_are_refused_as_data(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf", head_size=24)
    with pytest.raises(kvik.DataError, match=r"m\.gguf: the native executor cannot run it: head size"):
        kvik.LLM(path)


def test_json_of_the_store_stays_json(tmp_path) -> None:
    path = write_model(tmp_path / "m.gguf")
    answer(path)
    kept = json.loads((ModelStore().folder_for(path) / "model.json").read_text())
    assert set(kept) == {"crc32", "value"} and kept["value"]["name"] == "m"


@pytest.mark.parametrize("prompts", [b"abc", {"a": 1}, (p for p in ["a"]), None, 5, [b"abc"], {"a"}])
def test_what_is_no_prompt_is_refused(tmp_path, prompts) -> None:
    llm = kvik.LLM(write_model(tmp_path / "m.gguf"), engine=kvik.EngineParams(threads=1))
    with pytest.raises(kvik.ParameterError, match="prompt"):
        llm.generate(prompts, GREEDY)


def test_everything_is_checked_before_anything_is_computed(tmp_path) -> None:
    llm = kvik.LLM(write_model(tmp_path / "m.gguf"), engine=kvik.EngineParams(threads=1))
    with pytest.raises(kvik.ParameterError, match=r"stop_token_ids must be in \[0, 97\], got 98"):
        llm.generate([[1], [2]], [GREEDY, kvik.SamplingParams(stop_token_ids=(98,))])
    assert llm.engine.stats.steps == 0


def test_a_failed_step_ends_its_sequences_and_the_next_request_runs(tmp_path, monkeypatch) -> None:
    llm = kvik.LLM(write_model(tmp_path / "m.gguf"), engine=kvik.EngineParams(threads=1))
    stream = llm.stream([1, 2], GREEDY)
    next(stream)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvik.engine.engine.sample_rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[3]], GREEDY)  # computes the stream's sequence first
    assert llm.generate([[1, 2]], GREEDY)[0].usage.completion_tokens
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert llm.engine.scheduler.pool.num_held == 0
