"""Runs in the environment of vLLM: decode of many sequences, offline; one JSON object on stdout.

vllm_worker.py '{"model": FOLDER, "dtype": "bfloat16", "sequences": [1, 16, 32], "prompt": 128, "new": 64, "repeat": 3}'
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

ANSWER = os.dup(1)
os.dup2(2, 1)  # vLLM and its processes write their log to stdout, up to their very end
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process of its own would begin with the first prompt alone

from vllm import LLM, SamplingParams  # noqa: E402

FIRST_TOKEN, LAST_TOKEN = 100, 40_000
BATCH_TOKENS = 8192  # the prompts of 32 sequences are one step, so that all decode together from the first token on


def decode(llm: LLM, request: dict[str, Any], sequences: int, draw: random.Random) -> float:
    """Tokens per second of all sequences together, from the last one's first token to the end."""
    prompts = [
        {"prompt_token_ids": [draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(request["prompt"])]}
        for _ in range(sequences)
    ]
    params = SamplingParams(temperature=0, max_tokens=request["new"] + 1, ignore_eos=True)
    answers = llm.generate(prompts, params, use_tqdm=False)
    if any(len(answer.outputs[0].token_ids) != request["new"] + 1 for answer in answers):
        raise SystemExit("not every answer is whole")
    firsts = [answer.metrics.first_token_ts for answer in answers]
    seconds = max(answer.metrics.last_token_ts for answer in answers) - max(firsts)
    if max(firsts) - min(firsts) > 0.2 * seconds:
        raise SystemExit("the sequences did not begin together")
    return float(sequences * request["new"] / seconds)


def main() -> None:
    request = json.loads(sys.argv[1])
    llm = LLM(
        request["model"], dtype=request["dtype"], max_model_len=2048, max_num_seqs=64,
        max_num_batched_tokens=BATCH_TOKENS, enable_prefix_caching=False, disable_log_stats=False,
    )  # fmt: skip
    draw, found = random.Random(0), {}
    for sequences in request["sequences"]:
        decode(llm, request, sequences, draw)
        found[str(sequences)] = [decode(llm, request, sequences, draw) for _ in range(request["repeat"])]
    with open(ANSWER, "w") as out:
        print(json.dumps(found), file=out)


if __name__ == "__main__":
    main()
