"""A server as a model: what is asked, what is checked of its answers, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from evaluation.endpoint.fake_server import Call, FakeServer, Reply, echo, logprob, models, serving, well

from kvik.errors import DataError, KvikError, ParameterError
from kvik.evaluation.endpoint import Endpoint
from kvik.params import BeamParams, Grammar, SamplingParams

Changed = Callable[[Call], Reply | None]


@contextmanager
def endpoint(changed: Changed = lambda call: None, **settings: Any) -> Iterator[tuple[Endpoint, FakeServer]]:
    """An endpoint of a good server, but for what `changed` answers."""
    with (
        serving(lambda call: changed(call) or well(call)) as server,
        Endpoint(server.url, sleep=lambda seconds: None, **settings) as made,
    ):
        yield made, server


def fails(kind: type[KvikError], message: str, act: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def expected(ids: list[int], first: int = 1) -> list[float]:
    return [logprob(token, index) for index, token in enumerate(ids)][first:]


def echoes(call: Call) -> bool:
    """A text to score, not the probe."""
    return call.path == "/v1/completions" and call.body["prompt"] != [0, 1]


def test_scores_are_the_servers_in_order_from_first_on() -> None:
    texts = [list(range(n, 2 * n + 2)) for n in range(30)]
    with endpoint(parallel=4) as (model, server):
        for text, found in zip(texts, model.score(texts), strict=True):
            assert found.token_ids == tuple(text) and found.first == 1
            assert found.logprobs.dtype == np.float64 and found.logprobs.tolist() == expected(text)
        asked = len(server.calls)
        late = model.score(texts, first=[len(text) - 1 for text in texts])
        assert [one.logprobs.tolist() for one in late] == [expected(text, len(text) - 1) for text in texts]
        assert len(server.calls) == asked + len(texts)  # model and form are found out once
        assert model.score([[5], [6, 7]], first=[1, 2])[0].logprobs.shape == (0,)
        assert len(server.calls) == asked + len(texts)  # nothing to predict, nothing asked
        (text,) = model.score("é!")
        assert text.token_ids == (0xC3, 0xA9, 0x21)


@pytest.mark.parametrize(
    ("refuses", "form"),
    [
        (lambda body: body["max_tokens"] < 1, (1, 1)),
        (lambda body: body["logprobs"] < 1, (0, 1)),
        (lambda body: False, (0, 0)),
    ],
)
def test_a_server_is_asked_as_it_wants(refuses: Callable[[dict[str, Any]], bool], form: tuple[int, int]) -> None:
    def changed(call: Call) -> Reply | None:
        if call.path == "/v1/completions" and refuses(call.body):
            return Reply(422, {"detail": "must be at least 1"})
        return None

    with endpoint(changed) as (model, server):
        assert model.score([[9, 8, 7]])[0].logprobs.tolist() == expected([9, 8, 7])
        assert model.info.context_length == 512 - form[0]
    body = server.calls[-1].body
    assert (body["max_tokens"], body["logprobs"]) == form and body["prompt"] == [9, 8, 7]


def test_a_server_that_leaves_logprobs_out_for_0_gets_1() -> None:
    def changed(call: Call) -> Reply | None:
        if call.path == "/v1/completions" and not call.body["logprobs"]:
            return Reply(body={"choices": [{"index": 0, "text": "", "logprobs": None}]})
        return None

    with endpoint(changed) as (model, _):
        assert model.score([[9, 8, 7]])[0].logprobs.tolist() == expected([9, 8, 7])


def test_a_server_that_scores_nothing_is_refused_by_name() -> None:
    def no_echo(call: Call) -> Reply | None:
        return Reply(400, {"error": "only no echo is supported"}) if call.path == "/v1/completions" else None

    def ignores(call: Call) -> Reply | None:
        table = {"tokens": ["x"], "token_logprobs": [-1.0]}
        return Reply(body={"choices": [{"text": "x", "logprobs": table}]}) if call.path == "/v1/completions" else None

    message = r"the server scores no given tokens \(echo with logprobs\): "
    with endpoint(no_echo) as (model, _):
        fails(ParameterError, message + "status 400: only no echo is supported", lambda: model.score([[1, 2]]))
    with endpoint(ignores) as (model, _):
        fails(ParameterError, message + "its answer has no log-probabilities", lambda: model.score([[1, 2]]))


class ByteTokens:
    """The fake server's tokens."""

    bos_id, add_bos = None, False

    def encode(self, text: str, *, add_special: bool = True, first: bool = True) -> list[int]:
        return list(text.encode())

    def piece(self, token: int, after: int | None = None) -> bytes:
        return bytes([token])


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"tokens": ["a", "X"]}, "token 1 of the answer is 'X', not the one of id 98"),
        ({"tokens": ["a", "bytes:\\x63"]}, "token 1 of the answer is 'bytes:.*63', not the one of id 98"),
        ({"tokens": ["token_id:97", "token_id:99"]}, "token 1 of the answer is 'token_id:99'"),
        ({"tokens": ["<s>", "a", "b"], "token_logprobs": [None, -1.0, -1.0]}, "tells of 3 tokens, 2 were asked for"),
        ({"tokens": ["a"], "token_logprobs": [None]}, "tells of 1 tokens, 2 were asked for"),
        ({"tokens": ["a"]}, "1 tokens and 2 token_logprobs"),
        ({"tokens": ["a", 5]}, r"tokens\[1\] is no string"),
        ({"token_logprobs": [-0.5, -0.5]}, "the first token has a log-probability, -0.5"),
        ({"token_logprobs": [None, None]}, r"token_logprobs\[1\] must be a logarithm"),
        ({"token_logprobs": [None, 0.5]}, r"token_logprobs\[1\] must be a logarithm of a probability, got 0.5"),
        ({"token_logprobs": [None, "-1"]}, r"token_logprobs\[1\] must be"),
        ({"token_logprobs": [None, True]}, r"token_logprobs\[1\] must be"),
        ({"token_logprobs": None}, r"no choices\[0\].logprobs.token_logprobs"),
        ({"tokens": {}}, r"no choices\[0\].logprobs.tokens"),
    ],
)
def test_an_echo_of_other_tokens_is_refused(table: dict[str, Any], said: str) -> None:
    with endpoint(lambda c: Reply(body=echo(c.body, **table)) if echoes(c) else None, tokenizer=ByteTokens()) as (
        model,
        _,
    ):
        fails(DataError, "/v1/completions: .*" + said, lambda: model.score([[97, 98]]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "no list 'choices'"), ({"error": {"message": "x"}}, "no list 'choices'"), ({"choices": []}, "has 0 choices, 1"),
        ({"choices": [5]}, r"choices\[0\] is no object"), ({"choices": [{"text": "ab"}]}, r"no choices\[0\].logprobs"),
    ],
)  # fmt: skip
def test_a_malformed_echo_names_what_is_missing(body: Any, said: str) -> None:
    with endpoint(lambda call: Reply(body=body) if echoes(call) else None) as (model, _):
        fails(DataError, said, lambda: model.score([[97, 98]]))


def test_a_server_that_puts_tokens_in_front_is_found_out() -> None:
    def changed(call: Call) -> Reply | None:
        if not echoes(call):
            return None
        answer = echo({**call.body, "prompt": [1, *call.body["prompt"]]})
        return Reply(body=answer)

    with endpoint(changed) as (model, _):
        fails(DataError, "the server scored 3 tokens, 2 were asked for", lambda: model.score([[97, 98]]))


def test_names_may_differ_in_spaces_and_broken_characters() -> None:
    table = {"tokens": ["", " b ", "\ufffd", "token_id:200"]}
    with endpoint(lambda c: Reply(body=echo(c.body, **table)) if echoes(c) else None, tokenizer=ByteTokens()) as (
        model,
        _,
    ):
        assert model.score([[97, 98, 0xC3, 200]])[0].logprobs.tolist() == expected([97, 98, 0xC3, 200])


def test_what_an_endpoint_cannot_give_is_refused_by_name() -> None:
    with endpoint() as (model, server):
        (found,) = model.score([[1, 2]])
        asked = len(server.calls)
        for name in ("logits", "logsumexp", "top"):
            fails(
                ParameterError,
                f"^{name}: a server tells single log-probabilities only",
                lambda n=name: getattr(found, n),
            )
        fails(ParameterError, "^score_rows: ", lambda: model.score_rows([1, 2]))
        fails(ParameterError, "^reduce=False: ", lambda: model.score([[1, 2]], reduce=False))
        fails(ParameterError, "^top: a server tells its best tokens by text", lambda: model.score([[1, 2]], top=5))
        fails(ParameterError, "an input has no tokens", lambda: model.score([[]]))
        fails(ParameterError, "got an item True", lambda: model.score([[1, True]]))
        fails(ParameterError, r"first must be in \[1, 2\], got 3", lambda: model.score([[1, 2]], first=3))
        fails(ParameterError, "first has 1 entries for 2 inputs", lambda: model.score([[1, 2], [3, 4]], first=[1]))
        (answer,) = model.generate("x", SamplingParams(max_tokens=3))
        fails(ParameterError, "token_ids: ", lambda: answer.choices[0].token_ids)
        fails(ParameterError, "cumulative_logprob: ", lambda: answer.choices[0].cumulative_logprob)
        assert len(server.calls) == asked + 1


def test_the_model_and_its_context() -> None:
    def two(call: Call) -> Reply | None:
        return Reply(body={"data": [{"id": "a"}, {"id": "b"}]}) if call.path == "/v1/models" else None

    def none(call: Call) -> Reply | None:
        return Reply(404, b"") if call.path == "/v1/models" else None

    with endpoint() as (model, server):
        assert model.info.name == f"fake at {server.url}" and model.info.context_length == 512
        assert len(model.info.digest) == 64
    with endpoint(two) as (model, _):
        fails(ParameterError, "has 2 models, give model=, one of: a, b", lambda: model.score([[1, 2]]))
    with endpoint(two, model="b") as (model, server):
        model.score([[1, 2]])
        assert server.calls[-1].body["model"] == "b"
        fails(ParameterError, "context_length: .* does not say how many tokens", lambda: model.info.context_length)
    with endpoint(none) as (model, _):
        fails(ParameterError, "/v1/models: status 404", lambda: model.score([[1, 2]]))
    with endpoint(none, model="b", context_length=99) as (model, _):
        assert model.info.context_length == 99
    with endpoint(lambda c: Reply(body={"data": 5}) if c.path == "/v1/models" else None) as (model, _):
        fails(DataError, "no list 'data'", lambda: model.score([[1, 2]]))
    fails(ParameterError, "model must be a name", lambda: Endpoint("http://a", ""))
    fails(ParameterError, "context_length must be at least 2", lambda: Endpoint("http://a", context_length=1))
    assert "secret" not in repr(Endpoint("http://a", api_key="secret"))


def test_answers() -> None:
    with endpoint() as (model, server):
        found = model.generate(["a", [65, 66]], SamplingParams(max_tokens=4, temperature=0, stop=("\n",), seed=7))
        assert [one.text for one in found] == ["<a>", "<[65, 66]>"] and found[0].choices[0].finish_reason == "stop"
        body = next(call.body for call in server.calls if call.path == "/v1/completions" and call.body["prompt"] == "a")
        assert body == {
            "model": "fake", "prompt": "a", "max_tokens": 4, "temperature": 0, "stop": ["\n"], "seed": 7, "top_p": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        model.generate("abc")  # to the end of the context, which the server would not do by itself
        assert server.calls[-1].body["max_tokens"] == 509 and server.calls[-1].body["prompt"] == [97, 98, 99]
        assert model.chat([{"role": "user", "content": "hello"}]).text == "HELLO"
        assert "max_tokens" not in server.calls[-1].body and server.calls[-1].body["logprobs"] is True
        fails(ParameterError, "nothing of the context is left", lambda: model.generate([[65] * 512]))
        fails(ParameterError, "params has 2 entries for 1 prompts", lambda: model.generate("a", [SamplingParams()] * 2))
        fails(
            ParameterError,
            "prompt has a lone surrogate",
            lambda: model.generate("\ud800", SamplingParams(max_tokens=1)),
        )


def test_samples_with_their_tokens() -> None:
    table = {"tokens": ["h", "i"], "token_logprobs": [-0.5, -0.25], "top_logprobs": [{"h": -0.5}, None]}
    listed = [{"index": i, "text": t, "token_ids": [1, i], "logprobs": table} for i, t in ((1, "second"), (0, "first"))]

    def changed(call: Call) -> Reply | None:
        return (
            Reply(body={"choices": listed, "usage": {"prompt_tokens": 1}}) if call.path == "/v1/completions" else None
        )

    with endpoint(changed) as (model, _):
        (found,) = model.generate("x", SamplingParams(n=2, max_tokens=2, logprobs=1))
        assert [one.text for one in found.choices] == ["first", "second"] and found.usage == {"prompt_tokens": 1}
        choice = found.choices[1]
        assert choice.token_ids == (1, 1) and choice.cumulative_logprob == -0.75
        assert choice.logprobs is not None and choice.logprobs[0] == ("h", -0.5, {"h": -0.5})
        fails(DataError, "has 2 choices, 3 were asked", lambda: model.generate("x", SamplingParams(n=3, max_tokens=2)))
        table["token_logprobs"] = [-0.5]
        fails(DataError, "logprobs is malformed", lambda: model.generate("x", SamplingParams(n=2, max_tokens=2)))
        listed[0]["index"] = 0
        fails(
            DataError, "index does not run from 0 to 1", lambda: model.generate("x", SamplingParams(n=2, max_tokens=2))
        )


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_parameters_that_a_server_does_not_know_are_refused(owner: str) -> None:
    def changed(call: Call) -> Reply | None:
        return Reply(body=models(owner)) if call.path == "/v1/models" else None

    asked: list[tuple[str, Any]] = [
        ("typical_p", SamplingParams(max_tokens=1, typical_p=0.5)),
        ("grammar", SamplingParams(max_tokens=1, grammar=Grammar.regex("a"))),
        ("trace", SamplingParams(max_tokens=1, trace=True)),
        ("num_beams", BeamParams(max_tokens=1)),
    ]
    if owner == "somebody":
        asked.append(("top_k", SamplingParams(max_tokens=1, top_k=5)))
    with endpoint(changed) as (model, server):
        for name, params in asked:
            fails(ParameterError, f"^{name}: ", lambda p=params: model.generate("x", p))
            fails(ParameterError, f"^{name}: ", lambda p=params: model.chat([{"role": "user", "content": "x"}], p))
        assert server.paths() == ["/v1/models"]


TEXT = "Grüße, 世界 😀 a"


def pieces_of(text: str) -> list[bytes]:
    """Two bytes a token, so that characters are split."""
    data = text.encode()
    return [data[i : i + 2] for i in range(0, len(data), 2)]


@pytest.mark.parametrize("shape", ["kvik", "vllm byte-level", "llama-server"])
def test_the_servers_tokenizer(shape: str) -> None:
    from kvik.text.vocabulary import BYTE_ALPHABET

    letters = {byte: char for char, byte in BYTE_ALPHABET.items()}
    vocabulary: list[bytes] = [b"<s>"]

    def ids_of(text: str) -> list[int]:
        for piece in pieces_of(text):
            if piece not in vocabulary:
                vocabulary.append(piece)
        return [vocabulary.index(piece) for piece in pieces_of(text)]

    def tokenize(body: dict[str, Any]) -> Reply:
        if shape == "llama-server":
            ids = [0] * body.get("add_special", False) + ids_of(body.get("content", ""))
            whole = [vocabulary[token].decode("utf-8", "replace") for token in ids]
            told = [list(vocabulary[t]) if "\ufffd" in name else name for t, name in zip(ids, whole, strict=True)]
            return Reply(body={"tokens": [{"id": t, "piece": p} for t, p in zip(ids, told, strict=True)]})
        ids = [0] * body["add_special_tokens"] + ids_of(body["prompt"])
        names = [vocabulary[token].decode("utf-8", "replace") for token in ids]
        if shape != "kvik":
            names = ["".join(letters[byte] for byte in vocabulary[token]) for token in ids]
        return Reply(body={"count": len(ids), "tokens": ids, "token_strs": names})

    def changed(call: Call) -> Reply | None:
        if call.path == "/tokenize":
            return tokenize(call.body)
        if call.path == "/v1/completions":
            answer = echo(call.body)
            names = [
                "bytes:" + "".join(f"\\x{byte:02x}" for byte in vocabulary[t])
                for t in call.body["prompt"]
                if t < len(vocabulary)
            ]
            answer["choices"][0]["logprobs"]["tokens"][: len(names)] = names
            return Reply(body=answer)
        return None

    with endpoint(changed) as (model, _):
        tokens = model.tokenizer
        assert tokens.add_bos and tokens.bos_id == 0
        ids = tokens.encode(TEXT)
        assert ids == [0, *ids_of(TEXT)] and tokens.encode(TEXT, add_special=False, first=False) == ids[1:]
        assert [tokens.piece(token, 5) for token in ids] == [b"", *pieces_of(TEXT)]
        assert tokens.encode("") == [0] and tokens.encode("", add_special=False) == []
        fails(ParameterError, "the bytes of token 999 are not known; give tokenizer=", lambda: tokens.piece(999))
        fails(ParameterError, "lone surrogate", lambda: tokens.encode("\ud800"))
        model.score([ids])


def test_a_tokenizer_that_puts_a_space_in_front() -> None:
    def changed(call: Call) -> Reply | None:
        if call.path != "/tokenize":
            return None
        pieces = [p for p in ("\u2581" + call.body["prompt"].replace(" ", "\u2581")) if p != "\n"]
        names = [*["<s>"] * call.body["add_special_tokens"], *pieces] + ["<0x0A>"] * call.body["prompt"].count("\n")
        return Reply(
            body={
                "count": 1,
                "tokens": [1 if n == "<s>" else ord(n[-2]) if len(n) > 1 else ord(n) for n in names],
                "token_strs": names,
            }
        )

    with endpoint(changed) as (model, _):
        tokens = model.tokenizer
        ids = tokens.encode("b c\n")
        assert ids[0] == 1 == tokens.bos_id
        assert b"".join(tokens.piece(t, a) for t, a in zip(ids, [None, *ids], strict=False)) == b"b c\n"
        fails(ParameterError, "puts a space in front of a text", lambda: tokens.encode("b", first=False))


def test_tokens_that_cannot_be_asked_for() -> None:
    def none(call: Call) -> Reply | None:
        return Reply(404, {"detail": "Not Found"}) if call.path == "/tokenize" else None

    def odd(call: Call) -> Reply | None:
        return (
            Reply(body={"count": 1, "tokens": [call.body["add_special_tokens"] * 1 + 7]})
            if call.path == "/tokenize"
            else None
        )

    def broken(call: Call) -> Reply | None:
        return Reply(body={"count": 1, "tokens": [1, "2"]}) if call.path == "/tokenize" else None

    with endpoint(none) as (model, _):
        fails(
            ParameterError,
            "/tokenize: status 404: Not Found; its tokens cannot be asked for: give tokenizer=",
            lambda: model.score("a"),
        )
    with endpoint(odd) as (model, _):
        fails(DataError, "what its /tokenize puts around 'a' is not understood", lambda: model.score("a"))
    with endpoint(broken) as (model, _):
        fails(DataError, "'2' is no token id", lambda: model.score("a"))
