"""Runs in Kvik's environment: times the library's evaluations; one JSON object on stdout.

kvik_evaluation.py '{"mode": …, "model": …, "threads": 2, …}'
    cut         "source", "windows", "window", "long_texts", "long_tokens", "echo": writes "text" of whole windows with
                their "tokens", and "long" texts that end as they begin, cut where their tokens stay the same
    perplexity  "text", "window": seconds, result
    losses      "tokens" [windows, window], "first", "out": each window's summed loss from token "first" on
    divergence  "text", "window", "layouts": two layouts of the model in lockstep
    longppl     "long", "short", "slide": LongPPL, the model its own evaluator, and its key tokens
    rouge       "pairs", "repeat": four kinds with F1; bleu: of all together and of each
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import kvik

ENDS = 64  # tokens at each end of a piece that tell whether it may be cut there
WARM_UP = 4000  # characters, from the end: nothing cached of them is of use at the beginning

Found = dict[str, Any]


def build(request: Found, weights: str = "auto") -> kvik.LLM:
    return kvik.LLM(request["model"], weights=weights, engine=kvik.EngineParams(threads=request["threads"]))


# --- texts


def cut(request: Found) -> Found:
    tokenizer = build(request).tokenizer
    ids = tokenizer.encode(Path(request["source"]).read_text(), add_special=False)
    count = request["windows"] * request["window"]
    end, part, text = piece(tokenizer, ids, 0, count)
    Path(request["text"]).write_text(text)
    np.save(request["tokens"], np.array(part, np.int32).reshape(request["windows"], request["window"]))
    texts = []
    for _ in range(request["long_texts"]):
        end, part, long = piece(tokenizer, ids, end, request["long_tokens"], request["echo"])
        texts.append({"text": long, "ids": part})
    Path(request["long"]).write_text(json.dumps(texts))
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}


def piece(tokenizer: Any, ids: list[int], start: int, count: int, echo: int = 0) -> tuple[int, list[int], str]:
    """The first piece of so many tokens from `start` on whose text alone has just these tokens: where it ends in ids, its
    tokens, its text. echo: how many of its last tokens are its first ones again.

    It does not end in a line break, which llama-perplexity would take off.
    """

    def kept(part: list[int]) -> str | None:
        try:
            text: str = tokenizer.decode_bytes(part).decode()
        except UnicodeDecodeError:
            return None
        return text if tokenizer.encode(text, add_special=False) == part else None

    for end in range(start + count - echo, len(ids) + 1):
        begin = end - count + echo
        part = ids[begin:end] + ids[begin : begin + echo]
        tail = kept(part[-ENDS:])
        if tail is None or tail.endswith("\n") or kept(part[:ENDS]) is None:
            continue
        if (text := kept(part)) is not None:
            return end, part, text
    raise SystemExit(f"the source has {len(ids)} tokens: no piece of {count} tokens from token {start} on can be cut")


# --- evaluations


def timed(work: Callable[[], Any], warm_up: Callable[[], Any]) -> tuple[Any, Found]:
    begun = perf_counter()
    warm_up()
    ready = perf_counter()
    result = work()
    return result, {"warm_up_s": ready - begun, "seconds": perf_counter() - ready}


def perplexity(request: Found) -> Found:
    from kvik.evaluation.perplexity import perplexity as evaluate

    llm, text, window = build(request), Path(request["text"]).read_text(), request["window"]
    result, found = timed(
        lambda: evaluate(llm, [text], window=window), lambda: evaluate(llm, [text[-WARM_UP:]], window=window)
    )
    return {
        **found, "perplexity": result.token_perplexity, "standard_error": result.standard_error,
        "predictions": result.predictions, "bits_per_byte": result.bits_per_byte,
    }  # fmt: skip


def losses(request: Found) -> Found:
    llm, windows = build(request), np.load(request["tokens"])
    scored = llm.score([list(map(int, ids)) for ids in windows], first=request["first"])
    np.save(request["out"], np.array([-one.logprobs.sum() for one in scored]))
    return {"tokens": sum(len(one.logprobs) for one in scored)}


def divergence(request: Found) -> Found:
    from kvik.evaluation.divergence import divergence as evaluate

    reference, model = (build(request, weights) for weights in request["layouts"])
    text, window = Path(request["text"]).read_text(), request["window"]
    result, found = timed(
        lambda: evaluate(model, reference, [text], window=window),
        lambda: evaluate(model, reference, [text[-WARM_UP:]], window=window),
    )
    return {**found, "kl_mean": result.kl_mean, "same_top": result.same_top}


def longppl(request: Found) -> Found:
    from kvik.evaluation.longppl import longppl as evaluate

    llm, texts = build(request), json.loads(Path(request["long"]).read_text())
    short, slide = request["short"], request["slide"]

    def run(texts: list[str]) -> Any:
        return evaluate(llm, llm, texts, window=short, stride=slide)

    result, found = timed(lambda: run([one["text"] for one in texts]), lambda: llm.score([texts[-1]["ids"][-512:]]))
    keys: list[list[int]] = [[] for _ in texts]
    starts = [places(llm.tokenizer, one["ids"]) for one in texts]
    for key in result.keys:
        keys[key.text].append(starts[key.text][key.offset])
    return {**found, "tokens": sum(len(one["ids"]) for one in texts), "value": result.value, "keys": keys}


def places(tokenizer: Any, ids: list[int]) -> dict[int, int]:
    """Index of each token by the bytes before it."""
    lengths = [len(tokenizer.decode_bytes([token])) for token in ids]
    return {start: at for at, start in enumerate(accumulate(lengths[:-1], initial=0))}


# --- metrics


def rouge(predictions: list[str], references: list[str]) -> Found:
    from kvik.evaluation.metrics import GROUPS, METRICS

    return {name: METRICS[name].function(predictions, references).value for name in GROUPS["rouge"]}


def bleu(predictions: list[str], references: list[str]) -> Found:
    from kvik.evaluation.metrics import METRICS

    result = METRICS["bleu"].function(predictions, references)
    return {"corpus": result.value, "mean": float(np.mean(result.per_sample))}


def metric(request: Found) -> Found:
    pairs, seconds, figures = json.loads(Path(request["pairs"]).read_text()), [], {}
    for _ in range(request["repeat"] + 1):
        begun = perf_counter()
        figures = {"rouge": rouge, "bleu": bleu}[request["mode"]](**pairs)
        seconds.append(perf_counter() - begun)
    return {"seconds": seconds[1:], "figures": figures}


MODES: dict[str, Callable[[Found], Found]] = {
    "cut": cut, "perplexity": perplexity, "losses": losses, "divergence": divergence, "longppl": longppl,
    "rouge": metric, "bleu": metric,
}  # fmt: skip


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(MODES[request["mode"]](request)))


if __name__ == "__main__":
    main()
