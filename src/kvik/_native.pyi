"""The native core. Arrays are checked there; errors are ValueError."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

KV_BLOCK_TOKENS: int

def isa_available() -> list[str]: ...
def isa_selected() -> str: ...
def packed_bytes(layout: int, n: int, k: int) -> int: ...
def exact_layout(type: int) -> int | None: ...
def pack(
    type: int,
    source: NDArray[np.uint8],
    n: int,
    k: int,
    permuted_heads: int,
    layout: int,
    target: NDArray[np.uint8],
    threads: int,
    /,
) -> tuple[int, float]: ...
def unpack(layout: int, packed: NDArray[np.uint8], k: int, out: NDArray[np.float32], /) -> None: ...
def checksum(data: NDArray[np.uint8], /) -> int: ...
def matmul(
    isa: str,
    layout: int,
    packed: NDArray[np.uint8],
    n: int,
    k: int,
    x: NDArray[np.float32],
    out: NDArray[np.float32],
    fine: bool,
    /,
) -> None: ...
def activate(isa: str, activation: int, x: NDArray[np.float32], out: NDArray[np.float32], /) -> None: ...

SAMPLE_DRAWN: int
SAMPLE_NO_TOKEN: int
SAMPLE_NOT_FINITE: int

# One draw a row. reals [R, 9]: temperature, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, top_n_sigma,
# xtc_probability, xtc_threshold; integers [R, 6]: seed, sample, position, top_k, logprobs, processed (0 or 1); edits: an
# Edits of kvik.decoding.edits or None a row. The rest are outputs: outcome (SAMPLE_...), token and its log-probability of
# each row, and its best tokens [R, K], of which the first `counts` are written. in_place: edits may be made in the row
# itself and taken back. pool: whose threads share the rows; None is the calling one. isa "" is the selected one.
def sample_rows(
    logits: NDArray[np.float32],
    reals: NDArray[np.float64],
    integers: NDArray[np.uint64],
    edits: list[Any],
    outcomes: NDArray[np.uint8],
    tokens: NDArray[np.int32],
    logprobs: NDArray[np.float64],
    counts: NDArray[np.int32],
    top_ids: NDArray[np.int32],
    top_logprobs: NDArray[np.float64],
    in_place: bool = False,
    pool: Pool | None = None,
    isa: str = "",
) -> None: ...

# The best tokens of each row's log-softmax after its edits: ids and logprobs [R, count], of which the first `found` are
# written; -1 where the row is damaged.
def best_rows(
    logits: NDArray[np.float32],
    edits: list[Any],
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    found: NDArray[np.int32],
    pool: Pool | None = None,
    isa: str = "",
) -> None: ...

# Kernels of the cache by themselves, for tests: one layer and KV head of one sequence. A page is (format of keys, of values,
# tokens), formats as kvik.ops.pages.KV_FORMATS has them; blocks are addresses in steps of 64 bytes, -1 where nobody looks.
_Page = tuple[int, int, int]

def hadamard(isa: str, x: NDArray[np.float32]) -> None: ...
def page_bytes(page: _Page, head_size: int) -> int: ...
def pack_page(
    isa: str, page: _Page, k: NDArray[np.float32], v: NDArray[np.float32], out: NDArray[np.uint8]
) -> None: ...

class UnitCache:
    def __init__(
        self,
        isa: str,
        memory: NDArray[np.uint8],
        head_size: int,
        full: _Page,
        blocks: NDArray[np.int32],
        packed: _Page | None,
        packed_blocks: NDArray[np.int32] | None,
        shift: int,
        keep: int,
    ) -> None: ...
    def append(self, slot: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None: ...
    def pack_group(self, group: int) -> None: ...
    def read_slot(self, slot: int, reader: int, k: NDArray[np.float32], v: NDArray[np.float32]) -> None: ...
    # q, sink_q, out [rows, group * D]; slots [rows], not yet less the shift; tile: rows at once; shares: threads' parts of one
    def attend(
        self,
        q: NDArray[np.float32],
        sink_q: NDArray[np.float32] | None,
        slots: NDArray[np.int32],
        group: int,
        window: int,
        sinks: int,
        scale: float,
        tile: int,
        shares: int,
        out: NDArray[np.float32],
        sums: NDArray[np.int64] | None,
        observed_first: int,
        observed_end: int,
    ) -> None: ...

# Rows of logits [R, V] reduced to the outputs, those of kvik.ops.Reduced.
def reduce_logits(
    pool: Pool | None,
    logits: NDArray[np.float32],
    targets: NDArray[np.int32],
    logsumexp: NDArray[np.float64],
    target_logits: NDArray[np.float32],
    top_ids: NDArray[np.int32],
    top_logits: NDArray[np.float32],
    isa: str = "",
) -> None: ...

# Two models' rows of logits [R, V]. kl: KL(base || other) in nats; the log-probability of each row's target and the best
# token, ties to the lower id, by both. A row of NaN, +infinity or nothing but -infinity: its figures are NaN, and the best
# token of the model it is of -1. pool: whose threads share the rows, one caller at a time; None is the calling one.
def compare_logits(
    pool: Pool | None,
    base: NDArray[np.float32],
    other: NDArray[np.float32],
    targets: NDArray[np.int32],
    kl: NDArray[np.float64],
    base_logprob: NDArray[np.float64],
    other_logprob: NDArray[np.float64],
    base_best: NDArray[np.int32],
    other_best: NDArray[np.int32],
    isa: str = "",
) -> None: ...

_Matrix: TypeAlias = tuple[NDArray[np.uint8], int, int, int]
_Norm: TypeAlias = tuple[NDArray[np.float32], float]
# kvik.ops.CacheView and Observation
_View: TypeAlias = tuple[int, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], int]
_Observation: TypeAlias = tuple[int, int, int, NDArray[np.int64] | None, NDArray[np.float32] | None]

class Pool:
    def __init__(self, threads: int, /) -> None: ...
    @property
    def threads(self) -> int: ...
    def measure_bandwidth(self, mib: int, repeats: int, /) -> float: ...

class Program:
    def __init__(
        self,
        pool: Pool,
        isa: str,
        max_rows: int,
        layers: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        kv: NDArray[np.uint8],
        /,
    ) -> None: ...
    # The other tuples are RowOp and Part of kvik.ops.native_lowering.
    def buffer(self, width: int, copies: int, /) -> int: ...
    def rotations(self, inv_freq: NDArray[np.float64], factor: float, /) -> int: ...
    def embed(self, table: _Matrix, by_position: bool, scale: float, out: int, /) -> None: ...
    def map(self, op: tuple[Any, ...], out: int, /) -> None: ...
    def linear(self, op: tuple[Any, ...], parts: Sequence[tuple[Any, ...]], /) -> None: ...
    def rotate_append(
        self, q: int, k: int, v: int, layer: int, table: int, q_norm: _Norm | None, k_norm: _Norm | None, /
    ) -> None: ...
    def attend(self, q: int, out: int, layer: int, window: int, scale: float | None, /) -> None: ...
    def experts(
        self,
        op: tuple[Any, ...],
        scores: int,
        count: int,
        used: int,
        normalize: bool,
        activation: int,
        gate: tuple[Any, ...],
        up: tuple[Any, ...],
        down: tuple[Any, ...],
        out: int,
        accumulate: bool,
        /,
    ) -> None: ...
    # vocabulary: the rows of the head that are tokens
    def logits(self, op: tuple[Any, ...], head: _Matrix, fine: bool, vocabulary: int, /) -> None: ...
    # full, packed: formats of keys and values by number, tokens; group_of: by layer, then KV head
    def register(
        self,
        full: _Page,
        packed: _Page | None,
        group_of: Sequence[int],
        keep: int,
        rotate: bool,
        sinks: int,
        window: int,
        /,
    ) -> int: ...
    def evict(self, source: _View, target: _View, kept: NDArray[np.int32], counts: NDArray[np.int32], /) -> None: ...
    def slots(self, view: _View, layer: int, head: int, /) -> int: ...
    def read(self, view: _View, layer: int, head: int, keys: bool, out: NDArray[np.float32], /) -> None: ...
    def save(self, blocks: NDArray[np.int32], steps: int, out: NDArray[np.uint8], /) -> None: ...
    def restore(self, blocks: NDArray[np.int32], steps: int, data: NDArray[np.uint8], /) -> None: ...
    def run(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        spans: NDArray[np.int32],
        layouts: NDArray[np.int32],
        blocks: NDArray[np.int32],
        block_spans: NDArray[np.int32],
        shifts: NDArray[np.int32],
        logit_rows: NDArray[np.int32],
        copies: NDArray[np.int32],
        reduce_rows: NDArray[np.int32],
        targets: NDArray[np.int32],
        logits: NDArray[np.float32],
        logsumexp: NDArray[np.float64],
        target_logits: NDArray[np.float32],
        top_ids: NDArray[np.int32],
        top_logits: NDArray[np.float32],
        observations: Sequence[_Observation],
        /,
    ) -> None: ...
    @property
    def times(self) -> tuple[float, float, float]: ...
    @property
    def phases(self) -> int: ...
    @property
    def logits_width(self) -> int: ...
    @property
    def isa(self) -> str: ...
