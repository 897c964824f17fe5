"""How byte-level BPE vocabularies cut text into words before merging, by the name in GGUF files (`tokenizer.ggml.pre`).

A pre-tokenizer is a list of regular expressions applied one after another: each match becomes a word of its own, and
what lies between the matches stays a word too; the next expression then cuts those words further. The expressions are
facts of the models: the authors' `tokenizer.json` files say them, and llama.cpp's table gives them their names.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


class PreTokenizer(NamedTuple):
    """One way to cut text into words.

    Attributes:
        patterns: regular expressions (Oniguruma syntax), applied in order.
        ignore_merges: a word that is a token as a whole is that token, whatever the merges say.
        add_bos: prompts begin with the beginning-of-text token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_SUFFIX = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_SUFFIX}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _llama3(digits: str, letters: str = r"\p{L}+", symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    return rf"(?i:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{symbols}|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    """Words split where lower case turns into upper case (GPT-4o, Tekken)."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# Cased letters as of the Unicode version that DeepSeek LLM was made with, as code points:
# a newer \p{L} would cut differently.
_DEEPSEEK_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 "
    "1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe "
    "1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 "
    "2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 "
    "a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a "
    "10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943 "
)


def _letter_class(ranges: str) -> str:
    """The inside of a character class from hexadecimal code points and ranges of them."""
    return "".join("-".join(chr(int(point, 16)) for point in entry.split("-")) for entry in ranges.split())


_HAN_HANGUL = r"[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LLAMA3 = (_llama3(r"\p{N}{1,3}"),)
_QWEN2 = (_llama3(r"\p{N}"),)

_FAMILIES: dict[tuple[str, ...], PreTokenizer] = {
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "a.x-4.0",
     "mellum"):
        PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"):
        PreTokenizer((r"\p{N}", _GPT2)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"):
        PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe"): PreTokenizer(_LLAMA3),
    ("glm4",): PreTokenizer(_LLAMA3, ignore_merges=True),
    ("minicpm5",): PreTokenizer((r"\p{N}{1,3}", _llama3(r"\p{N}+")), ignore_merges=True),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "grok-2", "solar-open"):
        PreTokenizer(_QWEN2),
    ("qwen35",): PreTokenizer((_llama3(r"\p{N}", r"[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
    ("seed-coder",): PreTokenizer((_llama3(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("deepseek-llm",): PreTokenizer((
        r"[\r\n]", rf"\s?[{_letter_class(_DEEPSEEK_LETTERS)}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
        _HAN_HANGUL, r"\p{N}+",
    )),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): PreTokenizer(_DEEPSEEK_V3),
    ("tekken",): PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    ("gpt-4o", "llama4", "kanana2"): PreTokenizer((_cased(rf"(?i:{_SUFFIX})?", r"\p{N}{1,3}"),)),
    ("bloom", "poro-chat", "gpt3-finnish"): PreTokenizer((_BLOOM,)),
    ("viking",): PreTokenizer((_BLOOM, r"\p{N}")),
}  # fmt: skip

#: Every name Kvik knows, with its pre-tokenizer.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _FAMILIES.items() for name in names}
