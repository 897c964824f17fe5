"""Runs in the environment of transformers: measures speed or writes logits; one JSON object on stdout.

The one argument is a JSON object:
{"mode": "speed", "threads": 2, "prompt": 512, "new": 128, "repeat": 3, "model": FOLDER, "dtype": "bf16"}
{"mode": "beams", "threads": 2, "prompts": [[5, …], …], "new": 64, "beams": 4, "model": FOLDER, "dtype": "bf16"}
{"mode": "logits", "threads": 2, "windows": IN.npy, "first": 256, "out": OUT.f32, "model": FOLDER, "dtype": "f32"}
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def speed(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size

    def ids(count: int) -> torch.Tensor:
        return torch.randint(100, vocabulary - 100, (1, count), generator=draw)

    def prefill() -> float:
        prompt = ids(request["prompt"])
        started = time.perf_counter()
        model(prompt, use_cache=True, logits_to_keep=1)
        return float(request["prompt"]) / (time.perf_counter() - started)

    def decode() -> float:  # from an empty context: one token in; greedy, a growing cache, its fastest plain loop
        token, cache = ids(1), None
        started = time.perf_counter()
        for _ in range(request["new"]):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = out.logits[:, -1:].argmax(-1)
        return float(request["new"]) / (time.perf_counter() - started)

    prefill(), decode()
    return {
        "prefill": [prefill() for _ in range(request["repeat"])],
        "decode": [decode() for _ in range(request["repeat"])],
    }


def beams(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `generate` with beams and no end of text, for each prompt; the first one warms up."""
    config = transformers.GenerationConfig(
        num_beams=request["beams"], max_new_tokens=request["new"], do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model.generation_config = transformers.GenerationConfig()

    def once(prompt: list[int]) -> float:
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        seconds = time.perf_counter() - started
        if found.shape[1] != len(prompt) + request["new"]:
            raise SystemExit(f"an answer has {found.shape[1] - len(prompt)} tokens, not {request['new']}")
        return seconds

    return {"seconds": [once(prompt) for prompt in request["prompts"]][1:]}


def logits(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    with open(request["out"], "wb") as out:
        for window in np.load(request["windows"]):
            rows = model(torch.from_numpy(window.astype(np.int64))[None]).logits[0, request["first"] : -1]
            out.write(np.ascontiguousarray(rows.float().numpy()).tobytes())
    return {"vocabulary": model.config.vocab_size}


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(request["model"], dtype=DTYPES[request["dtype"]])
    model.eval()
    load = time.perf_counter() - started
    with torch.inference_mode():
        result = {"speed": speed, "beams": beams, "logits": logits}[request["mode"]](model, request)
    print(json.dumps({"load_s": load, "version": transformers.__version__, **result}))


if __name__ == "__main__":
    main()
