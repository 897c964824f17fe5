"""Small vocabularies as GGUF metadata, the default model's, and the plain definitions they are tested against."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvik.weights.gguf import read_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

HARD_TEXTS = [
    "",
    " ",
    "  \t\n\r\n \x0b ",
    "Hello, world!",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇰 ✨👍🏽 emoji",
    "ខ្មែរ ភាសាខ្មែរ គឺជា",
    "0 00 000 0000 12345678901234567890 3.14159 ١٢٣ ½ Ⅻ ²",
    "     leading, 7       inside, trailing      ",
    "I'm you're he'll we'd they've it's 'tis ''' don''t I'M YOU'RE ’s",
    "\u0301\u0301a\u0301 e\u0308\u0323 \u200d\u200b\ufeff",
    "naïve café – “quotes” … 中文字符 日本語テキスト 한국어 ภาษาไทย हिन्दी العربية",
    "def f(x):\n\treturn {'a': [1, 2, 3]}  # c\n\n\n    pass\r\n",
    "<|im_start|>system\n<|im_end|> <|endoftext|><|endoftext|> <s></s> <unk> <0x0A>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "▁under▁▁score ▁ ĠĊ",
    "\U0001d54f\U0001f9ff \ufdd0\uffff\ufffd",
    "https://example.org/a?b=c&d=e#f user@example.org C:\\path\\to\\file $100.00 50% #1 @you",
]


@lru_cache(maxsize=4)
def gguf_metadata(path: Path) -> dict[str, Any]:
    with read_gguf(path) as file:
        return dict(file.metadata)


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level vocabularies, by byte (Radford et al. 2019)."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    rest = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(rest)) for b in range(256)]


def byte_level(
    pre: str = "gpt-2", *, merges: list[str] | None = None, extra: list[tuple[str, int]] | None = None, **keys: Any
) -> dict[str, Any]:
    """A byte-level vocabulary: `<|end|>`, `<|user|>`, the 256 bytes (2 to 257), the merges' results, `extra`."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "o r"] if merges is None else merges
    tokens = ["<|end|>", "<|user|>", *byte_alphabet(), *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    types = [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2)]
    for text, kind in extra or []:
        tokens.append(text)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}  # fmt: skip


def sentencepiece(words: list[tuple[str, float]] | None = None, **keys: Any) -> dict[str, Any]:
    """`<unk>`, `<s>`, `</s>`, 256 byte tokens (3 to 258), then words with scores."""
    if words is None:
        words = [
            ("▁", -9.0), ("h", -10.0), ("e", -11.0), ("l", -12.0), ("o", -13.0), ("w", -14.0), ("r", -15.0),
            ("d", -16.0), ("a", -17.0), ("n", -18.0), ("▁▁", -3.0), ("he", -1.0), ("ll", -2.0), ("hell", -4.0),
            ("▁hello", -2.5), ("llo", -1.5), ("▁hell", -3.5), ("▁w", -0.5), ("or", -0.25), ("▁wor", -6.0), ("aa", -5.0),
            ("aaa", -5.0), ("an", -5.5), ("na", -5.25),
        ]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(word for word, _ in words)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [score for _, score in words],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}  # fmt: skip


def plain_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece BPE as defined: while adjacent symbols make a piece, join the best-scored pair, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    pieces = {t: i for i, t in enumerate(tokens) if kinds[i] == NORMAL}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [(-scores[pieces[a + b]], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [pieces[symbol]] if symbol in pieces else [tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return ids


def oracle(metadata: dict[str, Any], pre_tokenizer: Any) -> Any:
    """The same byte-level vocabulary in `tokenizers`, its special tokens added the way transformers does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    )
    return made


def smollm_oracle(metadata: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer as its authors publish it: single digits, then GPT-2's words."""
    from tokenizers import pre_tokenizers

    return oracle(metadata, pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]))  # fmt: skip
