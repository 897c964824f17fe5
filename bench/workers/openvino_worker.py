"""Runs in the environment of OpenVINO: measures speed or writes logits; one JSON object on stdout.

The one argument is a JSON object:
{"mode": "speed", "threads": 2, "prompt": 512, "new": 128, "repeat": 3, "model": FILE.gguf, "backend": "PA" or "SDPA"}
{"mode": "logits", "threads": 2, "windows": IN.npy, "first": 256, "out": OUT.f32, "model": FILE.gguf, "folder": SCRATCH}
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai


def speed(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy, one sequence, on random tokens: prompt / time to first token, and 1 / mean time per later token."""
    started = time.perf_counter()
    pipe = genai.LLMPipeline(
        request["model"], "CPU", INFERENCE_NUM_THREADS=request["threads"], ATTENTION_BACKEND=request["backend"]
    )
    load = time.perf_counter() - started
    rng = np.random.default_rng(0)

    def once(prompt: int, new: int) -> Any:
        ids = rng.integers(100, 40_000, (1, prompt)).astype(np.int64)  # new ones each time: no prefix is found again
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        return pipe.generate(inputs, config).perf_metrics

    def prefill() -> float:
        return float(1e3 * request["prompt"] / once(request["prompt"], 2).get_ttft().mean)

    def decode() -> float:
        metrics = once(1, request["new"])
        if metrics.get_num_generated_tokens() != request["new"]:
            raise SystemExit(f"openvino generated {metrics.get_num_generated_tokens()} tokens, not {request['new']}")
        return float(1e3 / metrics.get_tpot().mean)

    for _ in range(2):  # kernels are compiled for a new shape on its first use
        prefill(), decode()
    return {
        "load_s": load,
        "prefill": [prefill() for _ in range(request["repeat"])],
        "decode": [decode() for _ in range(request["repeat"])],
    }


def logits(request: dict[str, Any]) -> dict[str, Any]:
    """Logits of the graph that GenAI makes of the GGUF, run by the same CPU plugin with its own default precisions."""
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / Path(request["model"]).name  # GenAI saves the graph beside the file
    shutil.copyfile(request["model"], copy)
    genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
    graph = openvino.Core().compile_model(
        str(folder / "openvino_model.xml"), "CPU", {"INFERENCE_NUM_THREADS": request["threads"]}
    )
    vocabulary = 0
    with open(request["out"], "wb") as out:
        for window in np.load(request["windows"]):
            count = len(window)
            run = graph.create_infer_request()  # the key-value cache is state of a request: a fresh one each window
            result = run.infer(
                {
                    "input_ids": window.astype(np.int64)[None],
                    "attention_mask": np.ones((1, count), np.int64),
                    "position_ids": np.arange(count, dtype=np.int64)[None],
                    "beam_idx": np.zeros(1, np.int32),
                }
            )
            rows = result["logits"][0, request["first"] : -1].astype(np.float32)
            vocabulary = rows.shape[1]
            out.write(np.ascontiguousarray(rows).tobytes())
    precision = {
        name: str(graph.get_property(name))
        for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    }
    return {"vocabulary": vocabulary, "precision": precision}


def main() -> None:
    request = json.loads(sys.argv[1])
    result = (speed if request["mode"] == "speed" else logits)(request)
    print(json.dumps({"version": genai.__version__, **result}))


if __name__ == "__main__":
    main()
