"""What the torch executor refuses, by name: layouts and passes that do not fit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvik.errors import ParameterError
from kvik.ops import Observation, Pass, Sizes
from kvik.ops.pages import ADDRESS_BYTES, BLOCK_TOKENS, CacheLayout, is_packed
from kvik.params import KV_FORMATS

__all__ = ["check_layout", "check_pass", "within"]


def check_layout(layout: CacheLayout, config: Sizes) -> None:
    """ParameterError names what the layout has that the model's cache cannot have."""
    _check_pages(layout, config.head_size)
    groups = [group for heads in layout.group_of for group in heads]
    if len(layout.group_of) != config.num_layers or any(len(heads) != config.num_kv_heads for heads in layout.group_of):
        raise ParameterError(f"layout: group_of must name {config.num_layers} layers of {config.num_kv_heads} KV heads")
    if set(groups) != set(range(max(groups) + 1)):
        raise ParameterError(f"layout: groups must be numbered from 0 without gaps, got {sorted(set(groups))}")
    if layout.keep < 0 or layout.keep % BLOCK_TOKENS:
        raise ParameterError(f"layout: keep must be a multiple of {BLOCK_TOKENS}, got {layout.keep}")
    if layout.sinks < 0 or layout.window < 0 or (layout.sinks and not layout.window):
        raise ParameterError(f"layout: sinks need a window, got sinks {layout.sinks}, window {layout.window}")
    if layout.packed is not None and layout.sinks > layout.keep:
        raise ParameterError(f"layout: sinks are read in full, got {layout.sinks} of them and keep {layout.keep}")


def _check_pages(layout: CacheLayout, size: int) -> None:
    packed = layout.packed
    for page in (layout.full, *([] if packed is None else [packed])):
        for name, kv in (("k", page.k), ("v", page.v)):
            if kv not in KV_FORMATS:
                raise ParameterError(f"layout: {name} must be one of {', '.join(KV_FORMATS)}, got {kv!r}")
            if kv == "int4" and size % 2:
                raise ParameterError(f"int4 needs an even head size, got {size}")
    full = layout.full
    if full.tokens != BLOCK_TOKENS or is_packed(full.k) or is_packed(full.v):
        raise ParameterError(f"layout: full blocks have {BLOCK_TOKENS} tokens and no integers, got {full}")
    if packed is not None and (
        packed.tokens < 1 or packed.tokens % BLOCK_TOKENS or not (is_packed(packed.k) or is_packed(packed.v))
    ):
        raise ParameterError(f"layout: packed pages have groups of {BLOCK_TOKENS} tokens and integers, got {packed}")
    if packed is not None and any(not is_packed(a) and a != b for a, b in ((packed.k, full.k), (packed.v, full.v))):
        raise ParameterError(f"layout: what is not packed has one format, got {full} and {packed}")
    if layout.rotate and size % 2:
        raise ParameterError(f"rotate needs an even head size, got {size}")


def check_pass(work: Pass, config: Sizes, layouts: list[CacheLayout], addresses: int) -> None:
    """ParameterError names what of a pass does not fit the model, its layouts or the pool's so many addresses."""
    rows = len(work.tokens)
    within("tokens", work.tokens, config.vocab_size)
    within("logit_rows", work.logit_rows, rows)
    within("reduce_rows", work.reduce_rows, rows)
    within("targets", work.targets, config.vocab_size)
    if len(work.targets) != len(work.reduce_rows) or not 0 <= work.top <= config.vocab_size:
        raise ParameterError(f"pass: {len(work.reduce_rows)} reduce_rows, {len(work.targets)} targets, top {work.top}")
    if len(work.positions) != rows or len(work.slots) != rows:
        raise ParameterError(f"pass: {rows} tokens, {len(work.positions)} positions, {len(work.slots)} slots")
    _check_spans("spans", work.spans, rows, 1)
    _check_spans("block_spans", work.block_spans, len(work.blocks), 0)
    if work.copies.ndim != 2 or work.copies.shape[1] != 3:
        raise ParameterError(f"pass: copies must be [C, 3], got {list(work.copies.shape)}")
    within("copies", work.copies, addresses + 1)
    within("ends of copies", work.copies[:, :2] + work.copies[:, 2:], addresses + 1)
    _check_tables(work, config, layouts, addresses)
    for observation in work.observations:
        _check_observation(observation, work, config)


def _check_spans(name: str, spans: NDArray[np.int32], end: int, least: int) -> None:
    if len(spans) < 2 or spans[0] != 0 or spans[-1] != end or (np.diff(spans) < least).any():
        raise ParameterError(f"pass: {name} must rise from 0 to {end}, got {spans.tolist()}")


def _check_tables(work: Pass, config: Sizes, layouts: list[CacheLayout], addresses: int) -> None:
    if len(work.layouts) != len(work.spans) - 1:
        raise ParameterError(f"pass: {len(work.spans) - 1} sequences, {len(work.layouts)} layouts")
    within("layouts", work.layouts, len(layouts))
    tables = sum(layouts[number].num_tables for number in work.layouts)
    if len(work.block_spans) != tables + 1 or len(work.shifts) != tables:
        raise ParameterError(
            f"pass: the layouts have {tables} tables, got {len(work.block_spans)} block_spans, {len(work.shifts)} shifts"
        )
    table = 0
    for s, number in enumerate(work.layouts):
        layout = layouts[number]
        pages = (layout.full,) if layout.packed is None else (layout.full, layout.packed)
        slots = work.slots[work.spans[s] : work.spans[s + 1]]
        if (np.diff(slots) < 1).any():
            raise ParameterError(f"pass: slots of sequence {s} must rise, got {slots.tolist()}")
        for units in layout.units:
            shift = work.shifts[table]
            for page in pages:
                blocks = work.blocks[work.block_spans[table] : work.block_spans[table + 1]]
                steps = units * page.share_bytes(config.head_size) // ADDRESS_BYTES
                within(f"blocks of sequence {s}", blocks, addresses - steps + 1, -1)
                if work.shifts[table] != shift:
                    raise ParameterError(f"pass: shifts of sequence {s}: a group's two tables have one")
                if page is layout.full:
                    within(f"slots of sequence {s}", slots - shift, len(blocks) * BLOCK_TOKENS)
                    within(f"blocks that sequence {s} writes", blocks[(slots - shift) // BLOCK_TOKENS], addresses)
                table += 1


def _check_observation(observation: Observation, work: Pass, config: Sizes) -> None:
    sequence, first, end, sums, queries = observation
    within("sequences of observations", np.array([sequence]), len(work.spans) - 1)
    shape = config.num_layers, config.num_kv_heads
    if sums is not None and (sums.dtype != np.int64 or sums.ndim != 3 or sums.shape[:2] != shape):
        raise ParameterError(
            f"pass: sums must be int64 [{shape[0]}, {shape[1]}, slots], got {sums.dtype} {list(sums.shape)}"
        )
    wanted = config.num_layers, end - first, config.num_heads * config.head_size
    if queries is not None and (queries.dtype != np.float32 or queries.shape != wanted):
        raise ParameterError(f"pass: queries must be float32 {list(wanted)}, got {queries.dtype} {list(queries.shape)}")


def within(name: str, values: NDArray[np.integer], end: int, low: int = 0) -> None:
    """ParameterError unless all values lie in [low, end)."""
    if values.size and (values.min() < low or values.max() >= end):
        raise ParameterError(f"{name} must lie in [{low}, {end}), got {values.min()} to {values.max()}")
