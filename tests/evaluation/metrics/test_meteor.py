"""METEOR against nltk's, without synonyms and with a WordNet: one made here, and the real one where nltk finds it."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.errors import DataError, ParameterError
from kvik.evaluation.metrics.meteor import meteor
from kvik.evaluation.metrics.wordnet import WordNet

nltk_meteor = pytest.importorskip("nltk.translate.meteor_score")

# part of speech: synsets of words, irregular forms
MEANINGS = {
    "noun": ([("car", "auto", "motor_car"), ("man",), ("dog", "hound"), ("box",)], {"men": ["man"]}),
    "verb": ([("run", "go"), ("heed", "mind"), ("box",)], {"ran": ["run"], "running": ["run"]}),
    "adj": ([("big", "large(p)"), ("glad", "happi")], {}),
    "adv": ([("fast", "quickli")], {}),
}
LETTERS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
WORDS = [
    "the", "The", "a", "cars", "auto", "motor", "car", "men", "man", "dog", "hounds", "box", "boxes", "boxing", "run", "runs",
    "ran", "going", "go", "heeding", "mind", "big", "large", "happy", "glad", "fast", "quickly", "貓", "🐈", ".", ",",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(WORDS), max_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A WordNet folder of a dozen words, as wndb(5WN) says."""
    folder = tmp_path_factory.mktemp("wordnet")
    for part, (synsets, irregular) in MEANINGS.items():
        data, index = "  1 a licence\n", {}
        for words in synsets:
            offset = len(data)
            listed = "".join(f"{word} {lexical} " for lexical, word in enumerate(words))
            data += f"{offset:08d} 00 {LETTERS[part]} {len(words):02x} {listed}000 | what it means  \n"
            for word in words:
                index.setdefault(word.partition("(")[0], []).append(offset)
        entries = [
            f"{word} {LETTERS[part]} {len(found)} 1 @ {len(found)} 0 {' '.join(f'{one:08d}' for one in found)}  \n"
            for word, found in sorted(index.items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("  1 a licence\n" + "".join(entries))
        (folder / f"{part}.exc").write_text("".join(f"{form} {' '.join(of)}\n" for form, of in irregular.items()))
    return folder


class Lemma:
    def __init__(self, name):
        self.found = name

    def name(self):
        return self.found


class Synset:
    def __init__(self, names):
        self.names = names

    def lemmas(self):
        return [Lemma(name) for name in self.names]


class Reader:
    """What nltk asks of a WordNet. synonyms: of a word."""

    def __init__(self, synonyms=lambda word: ()):
        self.synonyms = synonyms

    def synsets(self, word):
        return [Synset(self.synonyms(word))]


def nltk_score(prediction, several, reader, **weights):
    return nltk_meteor.meteor_score([one.split() for one in several], prediction.split(), wordnet=reader, **weights)


def check(prediction, several, reader, wordnet, **weights):
    several = [one for one in several if one.split()]
    if several:
        found = meteor([prediction], [several], wordnet=wordnet, tokenize="whitespace", **weights)
        assert found.value == nltk_score(prediction, several, reader, **weights)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3), st.sampled_from([{}, {"alpha": 0.5, "beta": 1.0, "gamma": 1.0}]))
def test_as_nltk_without_synonyms(prediction, several, weights):
    check(" ".join(prediction), [" ".join(one) for one in several], Reader(), None, **weights)


@settings(deadline=None)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_as_nltk_with_synonyms(folder, prediction, several):
    opened = WordNet(folder)
    check(" ".join(prediction), [" ".join(one) for one in several], Reader(opened.synonyms), opened)


def test_synonyms(folder):
    found = WordNet(folder).synonyms
    assert found("cars") == found("Car") == {"car", "auto"}  # motor_car is two words
    assert found("men") == {"man"} and found("ran") == {"run", "go"} and found("boxes") == {"box"}
    assert found("big") == {"big", "large"} and found("what") == frozenset()


def test_the_real_wordnet():
    nltk = pytest.importorskip("nltk")
    try:
        place = nltk.data.find("corpora/wordnet")
    except LookupError:
        pytest.skip("nltk finds no corpora/wordnet")
    from nltk.corpus import wordnet

    opened, draw = WordNet(str(place)), random.Random(0)
    names = draw.sample([name for name in wordnet.all_lemma_names() if "_" not in name], 1500)
    forms = [draw.choice([name, name + "s", name + "es", name + "ed", name + "ing", name + "er"]) for name in names]
    for word in forms:
        want = {lemma.name() for one in wordnet.synsets(word) for lemma in one.lemmas() if "_" not in lemma.name()}
        assert opened.synonyms(word) == want, word
    common = [sorted(opened.synonyms(word)) for word in ("car", "big", "go", "say", "house", "quick", "make", "child")]
    for _ in range(200):
        texts = [" ".join(draw.choice(draw.choice(common)) for _ in range(12)) for _ in range(3)]
        check(texts[0], texts[1:], wordnet, opened)
    # nltk's documentation
    assert meteor([MILITARY[0]], [MILITARY[1]], wordnet=opened, tokenize="whitespace").value == pytest.approx(
        0.6944, abs=5e-5
    )


MILITARY = (
    "It is a guide to action which ensures that the military always obeys the commands of the party",
    "It is a guide to action that ensures that the military will forever heed Party commands",
)


def test_golden():
    # 0.6944 in nltk's documentation, where no synonym matches
    found = meteor([MILITARY[0]], [MILITARY[1]], tokenize="whitespace")
    assert found.value == pytest.approx(0.6944, abs=5e-5)
    assert meteor(["non matching hypothesis"], ["this is a cat"]).value == 0
    # the same text: one chunk of three words
    assert meteor(["the cat sat"], ["the cat sat"]).value == 1 - 0.5 * (1 / 3) ** 3
    # cats and cat by their stems; two chunks: "the", "cat(s)"; P 2/3, R 2/2
    found = meteor(["the black cats"], ["The cat"])
    mean = (2 / 3) / (0.9 * 2 / 3 + 0.1)
    assert found.value == pytest.approx((1 - 0.5) * mean)
    assert found.parts == pytest.approx({"precision": 2 / 3, "recall": 1, "penalty": 0.5})


def test_tokens():
    assert meteor(["the cat."], ["the cat ."]).per_sample == meteor(["the cat ."], ["the cat ."]).per_sample
    assert meteor(["the cat."], ["the cat ."], tokenize="whitespace").value < 0.5


def test_signature_tells_what_was_there(folder):
    assert "|wordnet:none|tok:words|" in meteor(["a"], ["a"]).signature
    assert "|wordnet:sha256-" in meteor(["a"], ["a"], wordnet=folder).signature


def test_what_cannot_be_scored():
    found = meteor(["a cat", "a cat", "", "…"], ["a cat", "", "a", ["\n", " "]])
    assert found.per_sample[1:] == (None, 0.0, None) and found.value == found.per_sample[0] / 2
    assert [(one.index, one.reason) for one in found.unscored] == [
        (1, "no reference has a token"),
        (3, "no reference has a token"),
    ]
    assert meteor(["貓"], [["", "貓"]]).value == 0.5  # one word, one chunk


def test_no_wordnet_folder(folder, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: not a WordNet folder: index.noun is missing"):
        meteor(["a"], ["a"], wordnet=tmp_path / "nowhere")
    for case, (name, text, told) in enumerate(
        [
            ("index.verb", "run x 1\n", "line 1 is no entry"),
            ("index.noun", "man n many\n", "'man' is no entry"),
            ("data.noun", "nonsense\n", "no synset of WordNet"),
            ("data.noun", "é" * 300, "no synset of WordNet"),
            ("data.noun", "x" + "é" * 300, "no synset of WordNet"),  # one of both is entered within a character
            ("adv.exc", "\udcff", "no UTF-8"),
        ]
    ):
        broken = tmp_path / str(case)
        broken.mkdir()
        for path in folder.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        (broken / name).write_text(text, errors="surrogateescape")
        with pytest.raises(DataError, match=told):
            WordNet(broken).synonyms("man")


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ParameterError, match="tokenize must be one of words, whitespace"):
        meteor(["a"], ["a"], tokenize="13a")
    with pytest.raises(ParameterError, match="alpha must be finite and in"):
        meteor(["a"], ["a"], alpha=2)
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    with pytest.raises(ParameterError, match=r'meteor needs nltk: pip install "kvik\[eval\]"'):
        meteor(["a"], ["a"])


def test_long_texts(folder):
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(5000)}" for _ in range(10_000)) for _ in range(2)]
    assert 0 < meteor([texts[0]], [texts[1]], wordnet=folder).value < 1
