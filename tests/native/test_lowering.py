"""Ops in orders no family has: computed as defined, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native.tiny import assert_invariant, config, definition, executor, make_pass, pack, random_tensors, tokens

from kvik import _native
from kvik.errors import ParameterError
from kvik.models.config import ModelConfig
from kvik.ops import Experts, Ops, RopeTable
from kvik.ops.native_lowering import ROW_OPS, Part, RowOp
from kvik.weights.layouts import Layout

C = config(num_layers=1, windows=(None,))  # 6 heads and 2 KV heads of 16, hidden 96, vocabulary 97
D, Q, KV = 96, 96, 32
SHAPES = {
    "embed": (97, D), "positions": (512, D), "norm": (D,), "norm.bias": (D,), "heads": (16,), "short": (48,), "q": (Q, D),
    "k": (KV, D), "v": (KV, D), "o": (D, Q), "a": (D, D), "a.bias": (D,), "b": (D, D), "b.bias": (D,), "router": (6, D),
    "gates": (6 * 48, D), "ups": (6 * 48, D), "downs": (6 * D, 48),
}  # fmt: skip
WEIGHTS = random_tensors(SHAPES, Layout.F32)
TABLE = RopeTable(10.0 ** -np.arange(8.0))
EXPERTS = Experts("gates", "ups", "downs", 6, 1, False, "gelu_tanh")
Body = Callable[[Ops[Any], Any], Any]


def model(body: Body) -> Callable[[Ops[Any], ModelConfig], None]:
    def forward(ops: Ops[Any], c: ModelConfig) -> None:
        x = body(ops, ops.embed("embed"))
        ops.logits(ops.rms_norm(x, "norm", 1e-5), "embed")

    return forward


def attention(ops: Ops[Any], x: Any) -> Any:
    q, k, v = (ops.linear(x, name) for name in "qkv")
    return ops.linear(ops.attend(ops.rope(q, 6, TABLE), ops.rope(k, 2, TABLE), v, 0, None), "o")


def norm_read_both_ways(ops: Ops[Any], x: Any) -> Any:
    h = ops.rms_norm(x, "norm", 1e-5)
    return ops.add(h, attention(ops, h))


def norm_of_a_norm(ops: Ops[Any], x: Any) -> Any:
    return ops.linear(ops.rms_norm(ops.layer_norm(x, "norm", "norm.bias", 1e-5), "norm", 1e-5), "a")


def parallel_residual(ops: Ops[Any], x: Any) -> Any:
    h = ops.layer_norm(x, "norm", "norm.bias", 1e-5)
    return ops.add(ops.add(x, attention(ops, h)), ops.linear(h, "a", "a.bias"))


def sum_of_two_linears_of_one_input(ops: Ops[Any], x: Any) -> Any:
    return ops.add(ops.linear(x, "a"), ops.linear(x, "b", "b.bias"))


def two_linears_of_one_input_onto_one_sum(ops: Ops[Any], x: Any) -> Any:
    y = ops.linear(x, "q")
    z = ops.activate(y, "silu")
    return ops.add(ops.add(y, ops.linear(z, "a", "a.bias")), ops.linear(z, "b"))


def twice_the_same(ops: Ops[Any], x: Any) -> Any:
    y = ops.linear(x, "a")
    return ops.gate(ops.add(y, y), y, "gelu_tanh")


def activation_written_out(ops: Ops[Any], x: Any) -> Any:
    y = ops.activate(ops.linear(x, "a"), "gelu_tanh")
    return ops.add(ops.add(ops.gate(y, x, "silu"), y), ops.linear(y, "b"))


def norm_of_all_queries(ops: Ops[Any], x: Any) -> Any:
    q = ops.rms_norm(ops.linear(x, "q"), "norm", 1e-5)
    k, v = ops.linear(x, "k"), ops.linear(x, "v")
    return ops.linear(ops.attend(ops.rope(q, 6, TABLE), ops.rope(k, 2, TABLE), v, 0, 3, 0.5), "o")


def norm_of_heads_without_rotation(ops: Ops[Any], x: Any) -> Any:
    q, k = ops.rms_norm(ops.linear(x, "q"), "heads", 1e-5, 6), ops.linear(x, "k")
    return ops.add(x, ops.linear(ops.attend(q, k, ops.activate(ops.linear(x, "v"), "silu"), 0, None), "o"))


def experts_of_what_is_read_elsewhere(ops: Ops[Any], x: Any) -> Any:
    h = ops.rms_norm(x, "norm", 1e-5)
    return ops.add(ops.experts(h, ops.linear(x, "router"), EXPERTS), ops.linear(ops.add(h, x), "a"))


def experts_twice(ops: Ops[Any], x: Any) -> Any:
    for _ in range(2):
        h = ops.layer_norm(x, "norm", "norm.bias", 1e-5)
        x = ops.add(ops.experts(h, ops.linear(h, "router"), EXPERTS), x)
    return ops.experts(x, ops.activate(ops.linear(x, "router"), "silu"), EXPERTS)


def positions_by_themselves(ops: Ops[Any], x: Any) -> Any:
    p = ops.embed_positions("positions")
    return ops.add(ops.linear(p, "a"), ops.add(p, x))


BODIES = [
    norm_read_both_ways, norm_of_a_norm, parallel_residual, sum_of_two_linears_of_one_input,
    two_linears_of_one_input_onto_one_sum, twice_the_same, activation_written_out, norm_of_all_queries,
    norm_of_heads_without_rotation, experts_of_what_is_read_elsewhere, experts_twice, positions_by_themselves,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_any_order_is_computed_as_defined(body: Body) -> None:
    native = executor(C, WEIGHTS, model(body), kv="f32")
    torch = definition(C, WEIGHTS, model(body), kv="f32")
    for length, start in ((100, 0), (2, 100), (1, 102)):
        work = make_pass([(tokens(97, length, start), start, range(8))])
        want, got = torch.run(work), native.run(work)
        assert np.abs(got - want).max() <= 3e-5 * np.abs(want).max()
    assert_invariant(lambda **how: executor(C, WEIGHTS, model(body), **how), 97, 60)


def attend(ops: Ops[Any], q: Any, k: Any, v: Any) -> Any:
    return ops.linear(ops.attend(q, k, v, 0, None), "o")


def head_norm_elsewhere(ops: Ops[Any], x: Any) -> Any:
    return ops.linear(ops.rms_norm(x, "heads", 1e-5, 6), "a")


def head_norm_of_other_heads(ops: Ops[Any], x: Any) -> Any:
    q = ops.rms_norm(ops.linear(x, "q"), "short", 1e-5, 2)
    return attend(ops, q, ops.linear(x, "k"), ops.linear(x, "v"))


def rotated_values(ops: Ops[Any], x: Any) -> Any:
    return attend(ops, ops.linear(x, "q"), ops.linear(x, "k"), ops.rope(ops.linear(x, "v"), 2, TABLE))


def rotation_for_a_linear(ops: Ops[Any], x: Any) -> Any:
    return ops.linear(ops.rope(x, 6, TABLE), "a")


def rotation_of_other_heads(ops: Ops[Any], x: Any) -> Any:
    return attend(ops, ops.rope(ops.linear(x, "q"), 3, TABLE), ops.linear(x, "k"), ops.linear(x, "v"))


def only_queries_rotated(ops: Ops[Any], x: Any) -> Any:
    return attend(ops, ops.rope(ops.linear(x, "q"), 6, TABLE), ops.linear(x, "k"), ops.linear(x, "v"))


def queries_and_keys_by_two_tables(ops: Ops[Any], x: Any) -> Any:
    q = ops.rope(ops.linear(x, "q"), 6, TABLE)
    return attend(ops, q, ops.rope(ops.linear(x, "k"), 2, RopeTable(TABLE.inv_freq, 2.0)), ops.linear(x, "v"))


def keys_that_are_values(ops: Ops[Any], x: Any) -> Any:
    k = ops.linear(x, "k")
    return attend(ops, ops.linear(x, "q"), k, k)


def queries_read_elsewhere(ops: Ops[Any], x: Any) -> Any:
    q = ops.linear(x, "q")
    return ops.add(q, attend(ops, q, ops.linear(x, "k"), ops.linear(x, "v")))


def unknown_activation(ops: Ops[Any], x: Any) -> Any:
    return ops.activate(x, "relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (head_norm_elsewhere, "rms_norm 'heads'"), (head_norm_of_other_heads, "rms_norm 'short'"), (rotated_values, "rope"),
        (rotation_for_a_linear, "rope"), (rotation_of_other_heads, "6 heads here, not 3"), (only_queries_rotated, "one table"),
        (queries_and_keys_by_two_tables, "one table"), (keys_that_are_values, "attend"), (queries_read_elsewhere, "attend"),
        (unknown_activation, "activate: .* 'relu'"),
    ],
)  # fmt: skip
def test_what_the_kernels_lack_is_refused_by_name(body: Body, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        executor(C, WEIGHTS, model(body))


def test_tables_with_one_content_are_one() -> None:
    """Definitions make a table a layer; cosines and sines are computed once a pass for each that differs."""

    def body(ops: Ops[Any], x: Any) -> Any:
        q, k, v = (ops.linear(x, name) for name in "qkv")
        q = ops.rope(q, 6, RopeTable(TABLE.inv_freq.copy()))
        return ops.linear(ops.attend(q, ops.rope(k, 2, RopeTable(TABLE.inv_freq.copy())), v, 0, None), "o")

    work = make_pass([(tokens(97, 5), 0, [0])])
    got = executor(C, WEIGHTS, model(body)).run(work)
    assert np.array_equal(got, executor(C, WEIGHTS, model(attention)).run(work))


def raw_program() -> tuple[_native.Program, dict[int, int]]:
    program = _native.Program(_native.Pool(1), "auto", 8, 1, 1, 1, 16, np.zeros(4096, np.uint8))
    return program, {width: program.buffer(width, 1) for width in (16, 64, 65)}


def row_op(input: int, **changes: Any) -> RowOp:
    return RowOp(ROW_OPS["copy"], input, -1, None, None, 0.0, 0, 64)._replace(**changes)


def part(out: int, **changes: Any) -> Part:
    packed = pack(np.ones((64, 64), np.float32), Layout.F32)
    return Part(packed.data, 0, 64, 64, None, out, False, False)._replace(**changes)


LONG, SHORT = np.ones(64, np.float32), np.ones(32, np.float32)
BAD_CALLS: list[Callable[[_native.Program, dict[int, int]], Any]] = [
    lambda p, b: p.buffer(0, 1),
    lambda p, b: p.buffer(64, 1 << 30),
    lambda p, b: p.rotations(np.ones(7), 1.0),
    lambda p, b: p.embed((part(0).data, 0, 64, 64), False, float("nan"), b[64]),
    lambda p, b: p.embed((part(0).data, 0, 64, 64), False, 1.0, b[16]),
    lambda p, b: p.embed((part(0).data, 0, 128, 64), False, 1.0, b[64]),
    lambda p, b: p.map(row_op(b[64], kind=6), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["activate"], activation=2), b[64]),
    lambda p, b: p.map(row_op(99), b[64]),
    lambda p, b: p.map(row_op(b[16]), b[64]),
    lambda p, b: p.map(row_op(b[64]), b[65]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["add"]), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["gate"], second=b[65]), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["rms_norm"]), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["rms_norm"], weight=SHORT), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["layer_norm"], weight=LONG), b[64]),
    lambda p, b: p.map(row_op(b[64], kind=ROW_OPS["rms_norm"], weight=LONG, eps=-1.0), b[64]),
    lambda p, b: p.linear(row_op(b[64]), []),
    lambda p, b: p.linear(row_op(b[64]), [part(b[16])]),
    lambda p, b: p.linear(row_op(b[64]), [part(-1)]),
    lambda p, b: p.linear(row_op(b[64]), [part(b[65], bias=SHORT)]),
    lambda p, b: p.linear(row_op(b[64]), [part(b[64])]),
    lambda p, b: p.linear(row_op(b[64]), [part(b[65]), part(b[65])]),
    lambda p, b: p.rotate_append(b[16], b[64], b[65], 1, -1, None, None),
    lambda p, b: p.rotate_append(b[16], b[64], b[65], 0, 0, None, None),
    lambda p, b: p.rotate_append(b[16], b[64], b[64], 0, -1, None, None),
    lambda p, b: p.rotate_append(b[16], b[64], b[65], 0, -1, (np.ones(8, np.float32), 1e-5), None),
    lambda p, b: p.attend(b[16], b[64], 0, -1, None),
    lambda p, b: p.attend(b[16], b[64], 0, 0, float("inf")),
    lambda p, b: p.experts(row_op(b[64]), b[16], 1, 1, True, 0, part(b[65]), part(b[65]), part(b[16]), b[64], False),
    lambda p, b: p.experts(row_op(b[64]), b[16], 2, 1, True, 0, part(b[65]), part(b[16]), part(b[64]), b[64], False),
]


@pytest.mark.parametrize("call", range(len(BAD_CALLS)))
def test_recording_checks_every_range(call: int) -> None:
    program, buffers = raw_program()
    with pytest.raises((ValueError, IndexError)):
        BAD_CALLS[call](program, buffers)
