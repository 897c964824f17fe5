"""Runs in Kvik's environment: writes Kvik's logits for windows of tokens; one JSON object on stdout.

kvik_logits.py '{"model": …, "weights": "auto", "threads": 2, "windows": in.npy, "first": 256, "out": out.f32}'
"""

from __future__ import annotations

import json
import sys

import numpy as np

import kvik


def main() -> None:
    request = json.loads(sys.argv[1])
    llm = kvik.LLM(request["model"], weights=request["weights"], engine=kvik.EngineParams(threads=request["threads"]))
    vocabulary = 0
    with open(request["out"], "wb") as out:
        for window in np.load(request["windows"]):
            (scored,) = llm.score([[int(token) for token in window]], reduce=False)
            rows = np.ascontiguousarray(scored.logits[request["first"] : -1], dtype=np.float32)
            vocabulary = rows.shape[1]
            out.write(rows.tobytes())
    print(json.dumps({"vocabulary": vocabulary}))


if __name__ == "__main__":
    main()
