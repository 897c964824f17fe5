"""Hub folders in the structures of the model families, their small vocabularies trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from text.vocabularies import HARD_TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvik.text.pretokenizers import PRE_TOKENIZERS

CORPUS = [
    *HARD_TEXTS,
    "the quick brown fox jumps over the lazy dog and then the other dogs said hello world again and again",
    "    return self.value + other.value\n\n\n        if x == 10:\n            print('hello')\n",
    "Ångström café naïve 2024 12345 hello hello world world  double  spaces   triple",
]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def isolated(name: str) -> Any:
    (pattern,) = PRE_TOKENIZERS[name].patterns
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _byte_level(normalizer: Any, pre: Any, specials: list[str], ignore_merges: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def gpt2() -> Tokenizer:
    made = _byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def gpt2_with_prefix() -> Tokenizer:
    return _byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=True), ["<|endoftext|>"])


def llama3() -> Tokenizer:
    pre = pre_tokenizers.Sequence([
        isolated("llama-bpe"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    made = _byte_level(None, pre, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], ignore_merges=True)
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


def qwen2() -> Tokenizer:
    pre = pre_tokenizers.Sequence([
        isolated("qwen2"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])  # fmt: skip
    made = _byte_level(normalizers.NFC(), pre, [])
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>")])
    return made


def smollm() -> Tokenizer:
    pre = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])  # fmt: skip
    return _byte_level(None, pre, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


def tekken() -> Tokenizer:
    (pattern,) = PRE_TOKENIZERS["tekken"].patterns
    pre = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made = _byte_level(None, pre, ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], ignore_merges=True)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def flagged() -> Tokenizer:
    """Added tokens with every flag there is."""
    made = _byte_level(normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>", "</s>"])
    made.add_tokens([
        AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True, normalized=False),
        AddedToken("word", single_word=True), AddedToken("hell", normalized=False), AddedToken("hello w", normalized=True),
        AddedToken("é", normalized=True), AddedToken("\n\n", normalized=False),
    ])  # fmt: skip
    made.add_special_tokens([AddedToken("<both>", lstrip=True, rstrip=True, normalized=False)])
    return made


def _marked(pre: Any, normalizer: Any, specials: list[str], newlines: bool = False) -> Tokenizer:
    """SentencePiece-like BPE with byte fallback."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    if pre is not None and "Metaspace" in repr(pre):
        trained.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=80)
    trained.train_from_iterator([text.replace("▁", "").replace("<", " ") for text in CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {text: token for token, text in enumerate([*specials, *BYTES, *words])}
    merges = [tuple(pair) for pair in model["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre is not None:
        made.pre_tokenizer = pre
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    if newlines:
        made.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\n\n\n", "▁▁▁▁▁▁▁▁", "<table>")])
    first = specials.index("<s>" if "<s>" in specials else "<bos>")
    made.post_processor = processors.TemplateProcessing(
        single=f"{specials[first]} $A", special_tokens=[(specials[first], first)]
    )
    return made


_SP = ["<unk>", "<s>", "</s>"]


def llama2() -> Tokenizer:
    return _marked(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), _SP)


def llama2_normalized() -> Tokenizer:
    """As the first Llama 2 files had it: the special tokens are looked for in the normalized text."""
    made = json.loads(llama2().to_str())
    for entry in made["added_tokens"]:
        entry["normalized"] = True
    return Tokenizer.from_str(json.dumps(made))


def mistral() -> Tokenizer:
    pre = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return _marked(pre, None, [*_SP, "[INST]", "[/INST]"])


def metaspace() -> Tokenizer:
    return _marked(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True), None, _SP)


def gemma() -> Tokenizer:
    pre = pre_tokenizers.Split(" ", "merged_with_previous")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    return _marked(pre, normalizers.Replace(" ", "▁"), specials, newlines=True)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made
    for made in (
        gpt2, gpt2_with_prefix, llama3, qwen2, smollm, tekken, flagged, llama2, llama2_normalized, mistral, metaspace,
        gemma,
    )
}  # fmt: skip
#: These write "▁" for a space.
MARKED = ("llama2", "llama2_normalized", "mistral", "metaspace", "gemma")


@lru_cache
def reference(family: str) -> Tokenizer:
    return FAMILIES[family]()


def write_folder(folder: Path, tokenizer: Tokenizer | dict[str, Any], **files: Any) -> Path:
    """A hub folder; files: tokenizer_config={…} becomes tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
