"""Runs in the environment of transformers: perplexity and LongPPL in bf16; one JSON object on stdout.

{"mode": "perplexity", "model": FOLDER, "threads": 2, "tokens": IN.npy, "first": 1025, "out": OUT.npy}
{"mode": "longppl", "model": FOLDER, "threads": 2, "long": IN.json, "short": 4096, "slide": 1024}
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCHES = (1, 2, 4)
ROWS = 512  # of logits that are in f32 at a time
ALPHA, BETA = 2.0, -2.0


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[rows] in f32, of bf16 logits [rows, V] and what came."""
    parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat(
        [torch.nn.functional.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts]
    )


def batch_losses(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of windows [B, T]: the losses of tokens 1 to T - 1 of each."""
    logits = model(ids, use_cache=False).logits
    return [losses(rows[:-1], one[1:]) for rows, one in zip(logits, ids, strict=True)]


def quickest(model: Any, windows: torch.Tensor) -> int:
    """Windows at once: which of BATCHES takes least time a window."""
    batch_losses(model, windows[:1])

    def seconds(batch: int) -> float:
        begun = time.perf_counter()
        batch_losses(model, windows[:batch])
        return (time.perf_counter() - begun) / batch

    return min((batch for batch in BATCHES if batch <= len(windows)), key=seconds)


def perplexity(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """All tokens of the windows but their first; those from `first` on are summed up by windows for the comparison."""
    windows = torch.from_numpy(np.load(request["tokens"]).astype(np.int64))
    begun = time.perf_counter()
    batch = quickest(model, windows)
    ready = time.perf_counter()
    found = torch.stack([one for part in windows.split(batch) for one in batch_losses(model, part)])
    mean = float(found.double().mean())
    seconds = time.perf_counter() - ready
    np.save(request["out"], found[:, request["first"] - 1 :].double().sum(dim=1).numpy())
    return {"warm_up_s": ready - begun, "seconds": seconds, "perplexity": math.exp(mean), "batch": batch}


def longppl(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Fang et al. 2024, "What is wrong with perplexity for long-context language modeling?", one window after another.

    The model is its own evaluator, so that what it says of the whole text is computed once. Logits are computed where
    they are wanted only.
    """
    texts, short, slide = json.loads(Path(request["long"]).read_text()), request["short"], request["slide"]

    def last(ids: torch.Tensor, count: int) -> torch.Tensor:
        """Log-probabilities of the last `count` tokens."""
        logits = model(ids[None], use_cache=False, logits_to_keep=count + 1).logits[0]
        return -losses(logits[:-1], ids[-count:])

    begun = time.perf_counter()
    last(torch.tensor(texts[0]["ids"][:512]), 1)
    ready = time.perf_counter()
    keys, chosen = [], []
    for ids in (torch.tensor(one["ids"]) for one in texts):
        if len(ids) <= short:
            keys.append([])
            continue
        whole = last(ids, len(ids) - short)
        parts = []
        for end in range(short, len(ids), slide):
            stop = min(end + slide, len(ids))
            parts.append(last(ids[end - short : stop], stop - end))
        key = (whole - torch.cat(parts) > ALPHA) & (whole > BETA)
        keys.append((key.nonzero()[:, 0] + short).tolist())
        chosen += whole[key].double().tolist()
    value = math.exp(-sum(chosen) / len(chosen)) if chosen else None
    return {
        "warm_up_s": ready - begun, "seconds": time.perf_counter() - ready, "value": value, "keys": keys,
        "tokens": sum(len(one["ids"]) for one in texts),
    }  # fmt: skip


def main() -> None:
    import transformers

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.bfloat16)
    model.eval()
    with torch.inference_mode():
        result = {"perplexity": perplexity, "longppl": longppl}[request["mode"]](model, request)
    print(json.dumps({"version": transformers.__version__, **result}))


if __name__ == "__main__":
    main()
