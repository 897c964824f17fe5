"""The machine's share an engine may use."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.params.checks import flag, integer

__all__ = ["EngineParams"]

MAX_THREADS = 256
MAX_KV_BYTES = 2**50


@dataclass(frozen=True, kw_only=True)
class EngineParams:
    """The machine's share an engine may use.

    Attributes:
        threads: threads of the native core, 1 to 256; None takes every core this process may run on.
        kv_bytes: bytes of the KV cache's pool, 1 to 2**50; None takes a quarter of the machine's memory, or less where
            max_sequences whole contexts are less.
        max_batch_tokens: most tokens computed in one step, 1 to 65,536; a longer prompt is computed in chunks.
        max_sequences: most sequences (samples counted one by one) that run at once, 1 to 4,096; others wait.
        max_waiting: most requests that wait, 0 to 1,000,000; a further one is refused with TryAgainError.
        prefix_sharing: prompts that begin alike share the blocks of what they have in common.
    """

    threads: int | None = None
    kv_bytes: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 128
    max_waiting: int = 1024
    prefix_sharing: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None:
            integer("threads", self.threads, 1, MAX_THREADS)
        if self.kv_bytes is not None:
            integer("kv_bytes", self.kv_bytes, 1, MAX_KV_BYTES)
        integer("max_batch_tokens", self.max_batch_tokens, 1, 65536)
        integer("max_sequences", self.max_sequences, 1, 4096)
        integer("max_waiting", self.max_waiting, 0, 1_000_000)
        flag("prefix_sharing", self.prefix_sharing)
