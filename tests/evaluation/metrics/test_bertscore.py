"""BERTScore beside its definition, beside its authors' package, and at its edges."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation.metrics.small_encoders import LONGEST, by_definition, write_bert, write_roberta

from kvik.cli.app import main
from kvik.cli.output import Progress
from kvik.errors import DataError, KvikError, ParameterError
from kvik.evaluation.metrics import METRICS, MetricResult
from kvik.evaluation.metrics.bertscore import bertscore
from kvik.evaluation.metrics.encoder import Encoder, open_encoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("encoders") / "small-bert")


@pytest.fixture(scope="session")
def small(folder: Path) -> Encoder:
    return open_encoder(folder)


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    """The default encoder, from the store, which fetches it once."""
    return open_encoder()


def fails(kind: type[KvikError], message: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def random_texts(count: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    return [
        " ".join(drawn.choices(["the", "cat", "sat", "abc", "hg", "x"], k=drawn.randint(1, 9))) for _ in range(count)
    ]


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_it_is_the_papers_formula(folder: Path, idf: bool, layer: int) -> None:
    from transformers import AutoModel, AutoTokenizer

    pairs = list(zip(random_texts(24, 1), random_texts(24, 2), strict=True))
    right = by_definition(AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder), layer, pairs, idf)
    predictions, references = map(list, zip(*pairs, strict=True))
    found = bertscore(predictions, references, encoder=folder, layer=layer, idf=idf, batch_size=7)
    assert found.per_sample == pytest.approx([f1 for _, _, f1 in right], abs=1e-5) and not found.unscored
    assert found.value == pytest.approx(sum(f1 for _, _, f1 in right) / 24, abs=1e-5)
    assert found.parts["precision"] == pytest.approx(sum(p for p, _, _ in right) / 24, abs=1e-5)
    assert found.parts["recall"] == pytest.approx(sum(r for _, r, _ in right) / 24, abs=1e-5)


def test_batches_and_neighbours_change_nothing(small: Encoder) -> None:
    predictions, references = random_texts(20, 3), random_texts(20, 4)
    whole = bertscore(predictions, references, encoder=small)
    one = bertscore(predictions, references, encoder=small, batch_size=1)
    alone = [bertscore([p], [r], encoder=small).value for p, r in zip(predictions, references, strict=True)]
    assert whole.per_sample == pytest.approx(one.per_sample, abs=1e-6)
    assert whole.per_sample == pytest.approx(alone, abs=1e-6)


def test_equal_texts_are_1_and_the_best_reference_counts(small: Encoder) -> None:
    assert bertscore(["the cat sat"], ["  the cat sat\n"], encoder=small).value == pytest.approx(1.0, abs=1e-6)
    predictions, several = random_texts(10, 5), [random_texts(3, seed) for seed in range(10)]
    found = bertscore(predictions, several, encoder=small)
    singles = [bertscore(predictions, [refs[k] for refs in several], encoder=small) for k in range(3)]
    assert found.per_sample == pytest.approx([max(s.per_sample[i] for s in singles) for i in range(10)], abs=1e-6)


PREDICTIONS = [
    "The cat sat on the mat.", "Paris is the capital of France.", "I do not know.",
    "A quick brown fox jumps over a lazy dog.", "La réponse est 42, n'est-ce pas?", "word " * 600 + "end", "The boy was small.",
]  # fmt: skip
REFERENCES = [
    "A cat was sitting on the mat.", "The capital of Germany is Berlin.", "It is raining heavily today.",
    "The quick brown fox jumped over the lazy dog.", "The answer is 42.", "word " * 700, "The boy was small.",
]  # fmt: skip
SEVERAL = [
    ["Nothing here.", REFERENCES[0]], ["France's capital city is Paris.", REFERENCES[1]], ["I have no idea.", "It is raining."],
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "idf", "right"),
    [
        (5, False, [0.918284, 0.810446, 0.197686, 0.916121, 0.373005, 1.0, 1.0]),
        (5, True, [0.898542, 0.714727, 0.156785, 0.933208, 0.369052, 1.0, 1.0]),
        (6, True, [0.889458, 0.478254, 0.04554, 0.919675, 0.312864, 1.0, 1.0]),
    ],
)
def test_the_authors_figures(minilm: Encoder, layer: int, idf: bool, right: list[float]) -> None:
    """bert-score 0.3.13 from PyPI with transformers 4.44.2, torch 2.13.0 and this encoder: score(…, num_layers=, idf=, batch_size=1).

    With larger batches its padding raises the third figure of layer 6 to 0.047458.
    """
    found = (
        bertscore(PREDICTIONS, REFERENCES, layer=layer, idf=idf)
        if layer != minilm.layer
        else (bertscore(PREDICTIONS, REFERENCES, encoder=minilm, idf=idf))
    )
    assert found.per_sample == pytest.approx(right, abs=1e-5) and not found.unscored
    assert found.parts["truncated"] == 2 and f"|layer:{layer}/6|" in found.signature
    assert found.signature.startswith("bertscore|encoder:MiniLM(all-MiniLM-L6-v2")


def test_the_authors_figures_of_several_references(minilm: Encoder) -> None:
    """As above: score(…, num_layers=5), with and without idf."""
    plain = bertscore(PREDICTIONS[:3], SEVERAL, encoder=minilm)
    assert plain.per_sample == pytest.approx([0.918284, 0.918893, 0.82443], abs=1e-5)
    assert plain.parts["precision"] == pytest.approx((0.93164 + 0.940302 + 0.82443) / 3, abs=1e-5)
    assert plain.parts["recall"] == pytest.approx((0.905306 + 0.898438 + 0.82443) / 3, abs=1e-5)
    rare = bertscore(PREDICTIONS[:3], SEVERAL, encoder=minilm, idf=True)
    assert rare.per_sample == pytest.approx([0.898097, 0.903192, 0.784852], abs=1e-5)
    assert rare.parts["precision"] == pytest.approx((0.905631 + 0.930715 + 0.777613) / 3, abs=1e-5)


def reasons(result: MetricResult) -> dict[int, str]:
    return {one.index: one.reason for one in result.unscored}


def test_what_cannot_be_scored_is_said(small: Encoder) -> None:
    predictions = ["the cat", " \n", "sat", "\u200b\x00", "sat"]
    found = bertscore(predictions, ["the", "the", "", "cat", ["", "sat"]], encoder=small)
    assert reasons(found) == {
        1: "the prediction is empty", 2: "the reference is empty", 3: "the prediction has no tokens",
    }  # fmt: skip
    assert [score is None for score in found.per_sample] == [False, True, True, True, False]
    assert found.per_sample[4] == pytest.approx(1.0, abs=1e-6)
    assert found.value == pytest.approx((found.per_sample[0] + found.per_sample[4]) / 2)
    nothing = bertscore(["", "a"], ["a", ["", " "]], encoder=small)
    assert nothing.value is None and nothing.per_sample == (None, None) and "precision" not in nothing.parts
    assert reasons(nothing)[1] == "every reference, as the first, is empty"
    assert bertscore([], [], encoder=small).value is None


def test_idf_of_words_that_all_references_have_is_0(small: Encoder) -> None:
    found = bertscore(["cat", "sat"], ["the", "the"], encoder=small, idf=True)
    assert reasons(found)[0] == "the reference has only tokens whose IDF weight is 0"
    found = bertscore(["the", "sat cat"], ["the cat", "the sat"], encoder=small, idf=True)
    assert reasons(found) == {0: "the prediction has only tokens whose IDF weight is 0"}


def test_longer_texts_are_cut_and_that_is_said(small: Encoder) -> None:
    long = "a b c d e f g h " * 4
    found = bertscore([long, "cat"], [long + "sat", "the"], encoder=small)
    assert found.per_sample[0] == pytest.approx(1.0, abs=1e-6)  # alike up to there
    assert found.parts["truncated"] == 2 and f"|max_tokens:{LONGEST}|" in found.signature
    fits = " ".join("abcdefghabcdef")
    assert small.encode(fits) == (tuple(small.encode(fits).ids), False) and len(small.encode(fits).ids) == LONGEST
    assert bertscore(["cat"], ["the"], encoder=small).parts["truncated"] == 0


def test_roberta_words_are_written_as_inside_a_text(tmp_path: Path) -> None:
    opened = open_encoder(write_roberta(tmp_path / "small-roberta"))
    first, *inner, last = opened.encode(" c").ids
    assert (first, last) == (0, 2) and len(inner) == 1  # "Ġc", one token
    assert opened.longest == 32 and opened.around == {0, 2} and opened.layer == 2
    assert bertscore(["c cc"], ["c cc"], encoder=opened).value == pytest.approx(1.0, abs=1e-6)


def test_signature_names_all_that_decides(folder: Path, small: Encoder) -> None:
    signed = bertscore(["a"], ["b"], encoder=folder, layer=1, idf=True).signature
    assert signed.startswith("bertscore|encoder:small-bert(sha256-") and "|layer:1/3|idf:yes|" in signed
    assert "|torch:" in signed and "|transformers:" in signed and "|version:kvik-" in signed
    assert "|layer:3/3|idf:no|" in bertscore(["a"], ["b"], encoder=small).signature
    assert METRICS["bertscore"].function is bertscore


def test_bad_folders(tmp_path: Path, folder: Path) -> None:
    fails(DataError, "nowhere: is no folder of an encoder", lambda: open_encoder(tmp_path / "nowhere"))
    fails(DataError, "it holds no config.json", lambda: open_encoder(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    fails(DataError, "it holds neither model.safetensors nor", lambda: open_encoder(broken))
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{not json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    fails(DataError, "broken: is no encoder: ", lambda: open_encoder(broken))
    (broken / "config.json").write_text('{"model_type": "nothing-known"}')
    fails(DataError, "broken: is no encoder: ", lambda: open_encoder(broken))
    (broken / "config.json").write_text("{")
    fails(DataError, "broken: is no encoder: ", lambda: open_encoder(broken))


def test_bad_settings(folder: Path, small: Encoder) -> None:
    fails(ParameterError, r"layer must be in \[0, 3\], got 4", lambda: open_encoder(folder, 4))
    fails(ParameterError, "layer is 1, but this encoder was opened for layer 3", lambda: open_encoder(small, 1))
    fails(ParameterError, "batch_size must be in", lambda: bertscore(["a"], ["a"], encoder=small, batch_size=0))
    fails(ParameterError, "idf must be True or False", lambda: bertscore(["a"], ["a"], encoder=small, idf=1))  # type: ignore[arg-type]
    fails(
        ParameterError, "there are 1 predictions and 2 references", lambda: bertscore(["a"], ["a", "b"], encoder=small)
    )


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    fails(ParameterError, rf'bertscore needs {name}: pip install "kvik\[bertscore\]"', lambda: bertscore(["a"], ["a"]))


def test_the_command_shows_what_it_fetches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[object] = []

    def fetch(entry: object, progress: Progress) -> Path:
        told.append(progress)
        return folder

    monkeypatch.setattr("kvik.evaluation.metrics.encoder.encoder_folder", fetch)
    file = tmp_path / "P.jsonl"
    file.write_text('{"prediction": "the cat", "reference": "the cat"}\n')
    assert main(["eval", "score", "--metric", "bertscore", "--predictions", str(file), "--setting", "layer=1"]) == 0
    assert isinstance(told[0], Progress) and "bertscore: bertscore|encoder:MiniLM" in capsys.readouterr().out
