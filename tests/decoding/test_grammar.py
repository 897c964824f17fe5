"""Masks against what can be continued, over small vocabularies; texts against their grammars; hostile grammars."""

from __future__ import annotations

import itertools
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import perf_counter

import jsonschema
import numpy as np
import pytest
from text.vocabularies import byte_level, sentencepiece

from kvik.decoding import grammar as grammar_module
from kvik.decoding.grammar import GrammarMatcher, Grammars
from kvik.errors import ParameterError
from kvik.params import Grammar
from kvik.text.tokenizer import Tokenizer

END, OTHER_END, ROLE = 0, 1, 2


class Vocabulary:
    """Three special tokens, the 256 bytes, and some longer pieces, characters cut in the middle among them."""

    special_ids = frozenset((END, OTHER_END, ROLE))
    longer = (
        "ab",
        "abc",
        "bb",
        "bx",
        " a",
        "aé",
        "éé",
        "漢",
        "漢字",
        "0",
        "12",
        "a" * 5,
        '{"',
        '":',
        '","',
        "true",
        "  ",
    )

    def __init__(self, drops_after: frozenset[int | None] = frozenset()) -> None:
        self.tokens = [b"<end>", b"<other end>", b"<role>", *(bytes([b]) for b in range(256))]
        self.tokens += [text.encode() for text in self.longer] + ["é".encode() + b"\xe6", b"\xbc\xa2", b"\xa9a", b""]
        self.vocab_size = len(self.tokens)
        self.drops_after = drops_after

    def drops_space(self, after: int | None) -> bool:
        return after in self.drops_after

    def piece(self, token: int, after: int | None = None) -> bytes:
        return self.tokens[token].removeprefix(b" ") if self.drops_space(after) else self.tokens[token]

    def bytes_of(self, ids: list[int], after: int | None) -> bytes:
        return b"".join(self.piece(token, before) for token, before in zip(ids, [after, *ids], strict=False))


VOCABULARY = Vocabulary()
GRAMMARS = Grammars(VOCABULARY, VOCABULARY.vocab_size)


def allowed(matcher: GrammarMatcher) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist())


def language(pattern: str, alphabet: str, longest: int) -> list[bytes]:
    """All texts that match, of at most so many characters."""
    texts = ("".join(chars) for n in range(longest + 1) for chars in itertools.product(alphabet, repeat=n))
    return [text.encode() for text in texts if re.fullmatch(pattern, text, re.DOTALL)]


LANGUAGES = [
    ("(ab|abc|b{2,4})x?", "abcx", 5),
    ("[aé漢]{1,3}", "aé漢b", 3),
    ("a*", "ab", 9),
    ("(aé|漢字|é漢)+", "aé漢字", 4),
    (" ?a{0,2}", " a", 3),
    ("(?:a|ab)(?:c|bc)?", "abc", 4),
    ("[^a]b", "ab0 ", 2),
    ("0|12|1.", "012aé", 2),
]


@pytest.mark.parametrize(("pattern", "alphabet", "longest"), LANGUAGES)
def test_masks_are_what_can_be_continued(pattern: str, alphabet: str, longest: int) -> None:
    texts = language(pattern, alphabet, longest)
    tokens = [t for t in range(3, VOCABULARY.vocab_size) if VOCABULARY.tokens[t]]
    inside = set(alphabet.encode())  # what has other characters is outside of what we list
    finite = max(len(re.findall("", pattern)), 1) and "*" not in pattern and "+" not in pattern
    draw = random.Random(5)
    for _ in range(12):
        matcher = GRAMMARS.compile(Grammar.regex(pattern)).matcher(None, (END, OTHER_END))
        prefix = b""
        while not matcher.stopped:
            assert (END in allowed(matcher)) == (OTHER_END in allowed(matcher)) == (prefix in texts)
            want = {
                t for t in tokens
                if set(VOCABULARY.tokens[t]) <= inside and any(x.startswith(prefix + VOCABULARY.tokens[t]) for x in texts)
            }  # fmt: skip
            got = {t for t in allowed(matcher) if t > ROLE and set(VOCABULARY.tokens[t]) <= inside}
            if not finite and len(prefix.decode(errors="ignore")) + 5 > longest:
                break  # longer texts are not listed
            assert got == want
            if not want:
                break
            token = draw.choice(sorted(want))
            matcher.accept(token)
            prefix += VOCABULARY.tokens[token]


def test_a_text_that_is_complete_stops_at_once() -> None:
    matcher = GRAMMARS.compile(Grammar.regex("[0-9]{3}")).matcher(None, (END,))
    for token in (VOCABULARY.tokens.index(b"0"), VOCABULARY.tokens.index(b"12")):
        assert not matcher.stopped
        matcher.accept(token)
    assert matcher.stopped and allowed(matcher) == {END}
    matcher.accept(END)
    assert matcher.stopped and allowed(matcher) == {END}


@pytest.mark.parametrize("pattern", ["[0-9]{3}", "[0-9]{1,4}", "(ab|1)*x", "x1?"])
def test_an_end_token_that_is_text_ends_the_text_and_is_nothing_else(pattern: str) -> None:
    ends = {END, VOCABULARY.tokens.index(b"1"), VOCABULARY.tokens.index(b"12")}
    draw = random.Random(8)
    for _ in range(20):
        plain = GRAMMARS.compile(Grammar.regex(pattern)).matcher(None, (END,))
        matcher = GRAMMARS.compile(Grammar.regex(pattern)).matcher(None, ends)
        while not matcher.stopped:
            got, want = allowed(matcher), allowed(plain)
            assert got - ends == want - ends and got & ends == (ends if END in want else set())
            if not got - ends or (got & ends and draw.random() < 0.2):
                break
            token = draw.choice(sorted(got - ends))
            matcher.accept(token)
            plain.accept(token)
        assert allowed(matcher) >= ends
        matcher.accept(draw.choice(sorted(ends)))
        assert matcher.stopped and allowed(matcher) == ends


def test_special_and_unknown_tokens_are_never_allowed() -> None:
    wide = Grammars(VOCABULARY, VOCABULARY.vocab_size + 70)
    matcher = wide.compile(Grammar.regex("(?s:.)*")).matcher(None, (END,))
    assert matcher.mask().shape == (-(-(VOCABULARY.vocab_size + 70) // 32),) and matcher.mask().dtype == np.uint32
    got = allowed(matcher)
    assert END in got and not got & {OTHER_END, ROLE} and max(got) < VOCABULARY.vocab_size - 1  # the last is empty
    narrow = Grammars(VOCABULARY, 100)
    assert max(allowed(narrow.compile(Grammar.regex("(?s:.)*")).matcher(None, (END,)))) < 100


@pytest.mark.parametrize("drops_after", [frozenset({None, ROLE}), frozenset({None, ROLE, 3 + ord("b")})])
def test_a_space_that_is_taken_away_is_not_in_the_text(drops_after: frozenset[int | None]) -> None:
    vocabulary = Vocabulary(drops_after)
    grammars = Grammars(vocabulary, vocabulary.vocab_size)
    texts = language("(a|b| ){1,4}", "ab ", 4)
    draw = random.Random(3)
    for after in (None, ROLE, 3 + ord("x")):
        for _ in range(6):
            matcher, ids = grammars.compile(Grammar.regex("(a|b| ){1,4}")).matcher(after, (END,)), list[int]()
            while not matcher.stopped:
                before = ids[-1] if ids else after
                prefix = vocabulary.bytes_of(ids, after)
                want = {
                    t for t in range(3, vocabulary.vocab_size)
                    if (p := vocabulary.piece(t, before)) and any(x.startswith(prefix + p) for x in texts)
                }  # fmt: skip
                assert allowed(matcher) - {END} == want
                assert (END in allowed(matcher)) == (prefix in texts)
                ids.append(draw.choice(sorted(want)))
                matcher.accept(ids[-1])
            assert vocabulary.bytes_of(ids, after) in texts
            matcher.restore(1)
            again = grammars.compile(Grammar.regex("(a|b| ){1,4}")).matcher(after, (END,))
            again.accept(ids[0])
            assert allowed(again) == allowed(matcher)


SCHEMAS = [
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1, None]}}, "required": ["b"]},
    {"type": "array", "items": {"type": "number", "minimum": -2, "exclusiveMaximum": 7.5}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"type": "string", "maxLength": 5}, {"const": {"k": [True]}}, {"type": "null"}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#/$defs/n"},
     {"type": "boolean"}]}}, "required": ["n"], "additionalProperties": False}}},
    {"type": "string", "pattern": "^(ab|c)+[0-9]{2}$"},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": f"k{i}"}}, "required": ["k"]} for i in range(3)]},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "integer"}}, "additionalProperties": False},
]  # fmt: skip
ARITHMETIC = """
start: sum
sum: sum ("+" | "-") product | product
product: product "*" atom | atom
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
REGEXES = [
    r"\d{3}-\d{2,4}",
    r"(?i)(yes|no|perhaps)!?",
    r"[^\x00-\x1f\"]{0,9}",
    r"a/b\\c|\[x\]",
    "(é|漢字){1,3}",
    r"[a-z_]+@[0-9]{1,3}\.(org|net)",
]


def written(grammar: Grammar, seed: int, most: int = 60) -> tuple[str, bool]:
    """A text drawn at random, and whether it is whole; a place visited before is come back to on the way."""
    draw, ids = random.Random(seed), list[int]()
    matcher = GRAMMARS.compile(grammar).matcher(None, (END,))
    while not matcher.stopped:
        choice = sorted(allowed(matcher))
        if choice == [END] or ((len(ids) >= most or draw.random() < 0.1) and END in choice):
            break
        if len(ids) > 3 * most:
            return "", False
        closing = [t for t in choice if VOCABULARY.tokens[t][:1] in (b'"', b"}", b"]", b")")] if len(ids) > most else []
        ids.append(draw.choice(closing or [t for t in choice if t != END]))
        matcher.accept(ids[-1])
    return b"".join(VOCABULARY.tokens[t] for t in ids).decode(), True


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_texts_of_a_schema_are_valid(schema: dict[str, object]) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    whole = 0
    for seed in range(12):
        text, ended = written(Grammar.json_schema(schema), seed)
        if ended:
            whole += 1
            validator.validate(json.loads(text))
    assert whole >= 3


@pytest.mark.parametrize("pattern", REGEXES)
def test_texts_of_a_regular_expression_match(pattern: str) -> None:
    found = [written(Grammar.regex(pattern), seed) for seed in range(12)]
    assert sum(ended for _, ended in found) >= 3
    assert all(re.fullmatch(pattern, text) for text, ended in found if ended)


def test_texts_of_a_lark_grammar_have_its_structure() -> None:
    whole = 0
    for seed in range(20):
        text, ended = written(Grammar.lark(ARITHMETIC), seed)
        if ended:
            whole += 1
            assert re.fullmatch(r"[0-9+*()-]+", text)
            eval(re.sub(r"\b0+(?=\d)", "", text))  # digits, operators and parentheses that Python takes too
    assert whole >= 5


@pytest.mark.parametrize(
    "grammar",
    [Grammar.json_schema(SCHEMAS[1]), Grammar.json_schema(SCHEMAS[4]), Grammar.regex(REGEXES[0]), Grammar.lark(ARITHMETIC),
     Grammar.lark('start: x "!" \nx[lazy]: /[a-z]*;/'), Grammar.lark('start: x "!"\nx[suffix="b"]: /[a-z]*/')],
    ids=lambda grammar: grammar.text[:20],
)  # fmt: skip
def test_restored_and_forked_is_replayed(grammar: Grammar) -> None:
    compiled, draw = GRAMMARS.compile(grammar), random.Random(7)

    def replay(ids: list[int]) -> GrammarMatcher:
        fresh = compiled.matcher(None, (END,))
        for token in ids:
            fresh.accept(token)
        return fresh

    matcher, ids = compiled.matcher(None, (END,)), list[int]()
    for _ in range(150):
        if not ids or (draw.random() < 0.7 and ids[-1] != END):
            token = draw.choice(sorted(allowed(matcher)))
            matcher.accept(token)
            ids.append(token)
        elif draw.random() < 0.5:
            place = draw.randrange(len(ids) + 1)
            matcher.restore(place)
            del ids[place:]
        else:
            other = matcher.fork()
            if ids[-1] != END:
                other.accept(draw.choice(sorted(allowed(other))))  # which the one it comes from does not notice
            matcher, other = matcher.fork(), matcher
        assert matcher.snapshot() == len(ids)
        fresh = replay(ids)
        assert allowed(matcher) == allowed(fresh) and matcher.stopped == fresh.stopped


def test_a_token_that_cannot_follow_is_refused() -> None:
    matcher = GRAMMARS.compile(Grammar.regex("ab")).matcher(None, (END,))
    with pytest.raises(ParameterError, match="grammar: "):
        matcher.accept(3 + ord("x"))
    with pytest.raises(ParameterError, match=r"snapshot must be in \[0, 0\]"):
        GRAMMARS.compile(Grammar.regex("ab")).matcher(None, (END,)).restore(1)


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.regex("a\\"), "ends with a backslash"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.regex(r"(a)\1"), "backreferences"),
        (Grammar.regex("a$b"), "lookarounds"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex(r"[^\s\S]"), "no text matches"),
        (Grammar.regex("\ud800"), "lone surrogate"),
        (Grammar.json_schema("{"), "no JSON"),
        (Grammar.json_schema("[]"), "object or a boolean"),
        (Grammar.json_schema('{"const": NaN}'), "NaN"),
        (Grammar.json_schema('{"type": "null", "type": "string"}'), "'type' twice"),
        (Grammar.json_schema({"minimun": 3}), "'minimun' in # is not supported; did you mean 'minimum'"),
        (Grammar.json_schema({"items": {"uniqueItems": True}}), "'uniqueItems' in #/items"),
        *[(Grammar.json_schema({key: {}}), f"'{key}' in #") for key in
          ("not", "if", "contains", "propertyNames", "dependentSchemas", "unevaluatedProperties", "$dynamicRef", "nullable")],
        (Grammar.json_schema({"type": "string", "format": "foo"}), "foo"),
        (Grammar.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (Grammar.json_schema({"$ref": "http://example.org/x"}), "example.org"),
        (Grammar.json_schema({"$ref": "#/nothing"}), "/nothing"),
        (Grammar.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (Grammar.json_schema(False), "schema is false"),
        (Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 4}), "minimum"),
        (Grammar.json_schema({"minimum": 2**53 + 1}), "no double holds"),
        (Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}), "'lenient'"),
        (Grammar.lark('s: "a"'), "no start rule"),
        (Grammar.lark('start: "a'), "lexer error"),
        (Grammar.lark("start: s\ns: s"), "no text matches"),
        (Grammar.lark('start: "a" <|end|>'), "names a token"),
        (Grammar.lark("start: <[0-9]>"), "names a token"),
        (Grammar.lark('start: x\nx[max_tokens=3]: /a+/'), "no option max_tokens"),
        (Grammar.lark('start: x\nx[lazy, stop="b"]: /a+/'), "no option stop"),
        (Grammar.lark('start: "a"\n%llguidance {"allow_invalid_utf8": true}'), "allow_invalid_utf8"),
        (Grammar.lark('start: %json {"minimun": 1}'), "minimun"),
        (Grammar.lark('start: %json {"x-guidance": {"lenient": true}}'), "lenient"),
        (Grammar.lark("start: @other"), "other"),
    ],
    ids=lambda value: value.text[:30].encode("ascii", "replace").decode() if isinstance(value, Grammar) else "",
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(grammar: Grammar, said: str) -> None:
    with pytest.raises(ParameterError) as refused:
        GRAMMARS.compile(grammar)
    message = str(refused.value)
    assert message.startswith("grammar: ") and said in message and "\n" not in message and len(message) < 400


def nested(levels: int, around: object, inner: object) -> object:
    for _ in range(levels):
        inner = around(inner)  # type: ignore[operator]
    return inner


def chain(rule: str, count: int, last: str) -> str:
    """Rules each of which is made of the next."""
    lines = [f"{rule}{i}: {rule}{i + 1} {rule}{i + 1}" for i in range(count)]
    return "\n".join([f"start: {rule}0", *lines, f"{rule}{count}: {last}"])


HOSTILE: dict[str, Grammar] = {
    "200,000 brackets": Grammar.json_schema("[" * 200_000),
    "5,000 levels": Grammar.json_schema('{"items":' * 5000 + "{}" + "}" * 5000),
    "references twice a level": Grammar.json_schema({"$ref": "#/$defs/a0", "$defs": {
        **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": {"type": "string"}}}),
    "references to choices": Grammar.json_schema({"$ref": "#/$defs/a0", "$defs": {
        **{f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"items": {"$ref": f"#/$defs/a{i + 1}"}}]}] * 2}
           for i in range(30)}, "a30": {"type": "string"}}}),
    "products of choices": Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(3)]} for i in range(12)]}),
    "a reference to itself": Grammar.json_schema({"$ref": "#"}),
    "10,000 values": Grammar.json_schema({"enum": [f"v{i:05}" for i in range(10_000)]}),
    "3,000 optional properties": Grammar.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    "a million items": Grammar.json_schema({"type": "array", "minItems": 10**6, "maxItems": 10**9}),
    "300 patterns of names": Grammar.json_schema({"patternProperties": {f"^p{i}_.*$": {} for i in range(300)}}),
    "a multiple of a million": Grammar.json_schema({"type": "integer", "multipleOf": 1_000_003}),
    "multiples whose common one is large": Grammar.json_schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "thousands of ranges": Grammar.json_schema({"anyOf": [
        {"type": "number", "minimum": -i * 1.2345678901e-5, "maximum": i * 9.87654321e10 + 0.1} for i in range(1, 1500)]}),
    "a pattern of a billion": Grammar.json_schema({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}),
    "patterns that must all hold": Grammar.json_schema({"allOf": [
        {"type": "string", "pattern": f"(.*{c}.*){{3}}"} for c in "abcdefghij"]}),
    "nested repetition": Grammar.regex("((a{1,1000}){1,1000}){1,1000}"),
    "a state for each of 2^30": Grammar.regex("(?s:.*)a(?s:.){30}"),
    "90,000 parentheses": Grammar.regex("(" * 90_000 + "a" + ")" * 90_000),
    "90,000 stars": Grammar.regex(".*" * 90_000),
    "50,000 optional characters": Grammar.regex("".join(f"{c}?" for c in "abcdefghij" * 5000)),
    "20,000 words": Grammar.regex("|".join(f"{i * 2654435761 % 2**32:x}" for i in range(20_000))),
    "5,000 stars to choose from": Grammar.regex("(" + "|".join(f"(x{i})*y" for i in range(5000)) + ")*"),
    "90,000 parentheses in Lark": Grammar.lark("start: " + "(" * 90_000 + '"a"' + ")" * 90_000),
    "terminals twice a level": Grammar.lark(chain("T", 40, '"a"')),
    "optional terminals twice a level": Grammar.lark(chain("T", 14, '"a"?')),
    "the same behind a letter": Grammar.lark('start: "x" T0' + chain("T", 14, '"a"?').removeprefix("start: T0")),
    "a stack of 8,000 rules": Grammar.lark(
        "start: t0\n" + "\n".join(f"t{i}: t{i + 1}" for i in range(8000)) + '\nt8000: "a"'),
    "a stack of 8,000 terminals": Grammar.lark(
        "start: T0\n" + "\n".join(f"T{i}: T{i + 1}" for i in range(8000)) + '\nT8000: "a"'),
    "rules twice a level": Grammar.lark(chain("t", 60, '"a"?')),
    "ambiguity": Grammar.lark('start: s\ns: s s | s s s | "a" |'),
    "more ambiguity": Grammar.lark('start: s\ns: s "x"? s "y"? s | /[a-z]/ | '),
    "20,000 optional words": Grammar.lark("start: " + " ".join(f'"{chr(97 + i % 26)}"?' for i in range(20_000))),
    "what is not": Grammar.lark("start: A\nA: ~(~(~/(a|b)*a(a|b){16}/ & /(.*b.{10}){2}/) & ~/.*c.{12}/)"),
    "parts of a long text": Grammar.lark('start: A\nA: %regex {"substring_chars": "' + "abcab" * 30_000 + '"}'),
    "permutations": Grammar.lark('start: p::0x0\np::_: "" %if is_ones([0:20])\n' + "\n".join(
        f'   | "{chr(97 + i)}" p::set_bit({i}) %if bit_clear({i})' for i in range(20))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(name: str) -> None:
    """A second each where nothing else runs; four here, for machines that are busy."""
    draw, begun = random.Random(1), perf_counter()
    spent = [0.0]
    try:
        matcher = GRAMMARS.compile(HOSTILE[name]).matcher(None, (END,))
        spent.append(perf_counter() - begun)
        for _ in range(40):
            if matcher.stopped or not (choice := sorted(allowed(matcher) - {END})):
                break
            begun = perf_counter()
            matcher.accept(draw.choice(choice))
            matcher.mask()
            spent.append(perf_counter() - begun)
    except ParameterError as error:
        spent.append(perf_counter() - begun)
        assert str(error).startswith("grammar: ") and "\n" not in str(error)
    assert max(spent) < 4


def test_a_request_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "BUDGET", 0.0)
    monkeypatch.setattr(grammar_module, "BUDGET_PER_TOKEN", 0.0)
    matcher = GRAMMARS.compile(Grammar.regex("[ab]+")).matcher(None, (END,))
    with pytest.raises(ParameterError, match=r"grammar: too costly: 1 tokens took"):
        matcher.mask()


def test_compiled_grammars_are_kept_and_bounded() -> None:
    grammars = Grammars(VOCABULARY, VOCABULARY.vocab_size)
    first = Grammar.regex("first")
    assert not grammars.known(first)
    one = grammars.compile(first)
    assert grammars.compile(Grammar.regex("first")) is one and grammars.known(first)
    for i in range(grammar_module.MOST_KEPT):
        grammars.compile(Grammar.regex(f"other{i}"))
    assert not grammars.known(first) and len(grammars._kept) == grammar_module.MOST_KEPT


def test_a_known_grammar_does_not_wait_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is tried in its process, those at hand are handed out; it is compiled once for all who wait for it."""
    grammars = Grammars(VOCABULARY, VOCABULARY.vocab_size)
    known, new = Grammar.regex("known"), Grammar.lark('start: "new"')
    one = grammars.compile(known)
    begun, go, tried = Event(), Event(), list[str]()

    def slow(source: str) -> None:
        tried.append(source)
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr(grammar_module, "check_apart", slow)
    with ThreadPoolExecutor(4) as threads:
        try:
            waiting = [threads.submit(grammars.compile, new) for _ in range(3)]
            assert begun.wait(60)
            assert threads.submit(grammars.compile, known).result(timeout=10) is one
            assert not grammars.known(new) and not any(each.done() for each in waiting)
        finally:
            go.set()
        assert len({each.result(timeout=60) for each in waiting}) == len(tried) == 1
    assert grammars.known(new)


def test_long_grammars_are_the_same_through_a_process_of_their_own() -> None:
    words = [f"word{i}" for i in range(1000)]
    matcher = GRAMMARS.compile(Grammar.regex("|".join(words))).matcher(None, (END,))
    for value in b"word77":
        matcher.accept(3 + value)
    assert {VOCABULARY.tokens[t] for t in allowed(matcher) - {END}} >= {bytes([b]) for b in b"0123456789"}


@pytest.mark.parametrize("metadata", [byte_level(), sentencepiece(), sentencepiece(add_space_prefix=False)])
def test_tokenizers_of_every_kind(metadata: dict[str, object]) -> None:
    """What the tokenizer decodes matches, after a special token and after text."""
    tokenizer = Tokenizer.from_gguf(metadata)
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 3)
    grammar, draw = Grammar.regex(r"( ?(hello|wor|é|\n)){1,6}"), random.Random(2)
    for after in (*sorted(tokenizer.special_ids), tokenizer.encode("o")[-1]):
        for _ in range(8):
            matcher, ids = grammars.compile(grammar).matcher(after, tokenizer.eos_ids), list[int]()
            while not matcher.stopped and not (ids and ids[-1] in tokenizer.eos_ids):
                ids.append(draw.choice(sorted(allowed(matcher))))
                matcher.accept(ids[-1])
            text = tokenizer.decode(ids, skip_special=True, after=after)
            assert re.fullmatch(grammar.text, text), text
            assert not tokenizer.special_ids.difference(tokenizer.eos_ids).intersection(ids)
