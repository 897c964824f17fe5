"""What HTTP costs: the same answers from LLM.generate, AsyncLLM and `kvik serve`, in turn, with many streams at once.

    python bench/serve_load.py --streams 16 --tokens 128 --rounds 6

The client is one thread on plain sockets that parses nothing, since it shares the cores with what it measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time

from kvik import LLM, AsyncLLM, SamplingParams

PROMPT = "Tell me a long story about the number {}. Once upon a time"


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def by_http(port: int, prompts: list[str], tokens: int) -> None:
    selector = selectors.DefaultSelector()
    for prompt in prompts:
        body = json.dumps(
            {
                "model": "smollm2",
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
        connection = socket.create_connection(("127.0.0.1", port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        selector.register(connection, selectors.EVENT_READ, [])
    left = len(prompts)
    while left:
        for key, _ in selector.select():
            data = key.fileobj.recv(65536)
            key.data.append(data)
            if b"[DONE]" in data or not data:
                text = b"".join(key.data)
                assert text.count(b'"finish_reason":"length"') == 1, text[-500:]
                selector.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1


async def by_async(llm: AsyncLLM, prompts: list[str], params: SamplingParams) -> None:
    async def one(prompt: str) -> None:
        async for _ in llm.generate(prompt, params):
            pass

    await asyncio.gather(*(one(prompt) for prompt in prompts))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("streams", 16), ("tokens", 128), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    params = SamplingParams(max_tokens=asked.tokens, temperature=0, ignore_eos=True)
    command = [sys.executable, "-m", "kvik.cli", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = int(server.stderr.readline().split(",")[0].rpartition(":")[2])
    llm, behind = LLM(), AsyncLLM()
    runs: dict[str, list[tuple[float, float]]] = {"generate": [], "async": [], "http": []}
    me = os.getpid()
    for turn in range(asked.rounds + 1):
        prompts = [PROMPT.format(turn * 100 + i) for i in range(asked.streams)]
        for name, pid, work in (
            ("generate", me, lambda p=prompts: llm.generate(p, params)),
            ("async", me, lambda p=prompts: asyncio.run(by_async(behind, p, params))),
            ("http", server.pid, lambda p=prompts: by_http(port, p, asked.tokens)),
        ):
            begun, cpu = time.perf_counter(), cpu_seconds(pid)
            work()
            if turn:  # the first warms up
                runs[name].append((time.perf_counter() - begun, cpu_seconds(pid) - cpu))
    total = asked.streams * asked.tokens
    for name, pairs in runs.items():
        rates = [total / seconds for seconds, _ in pairs]
        cpu = statistics.median(used for _, used in pairs) / total * 1e6
        ratio = statistics.median(g[0] / o[0] for g, o in zip(runs["generate"], pairs, strict=True))
        print(
            f"{name:9} {statistics.median(rates):7.0f} tokens/s (best {max(rates):.0f}), {ratio:.3f} of generate, {cpu:.0f} us of processor a token"
        )
    server.terminate()
    server.wait()
    behind.close()


if __name__ == "__main__":
    main()
