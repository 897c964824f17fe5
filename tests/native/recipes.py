"""One tiny decoder that can be put together like any family: norms, biases, rotations, windows, feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from native.tiny import config, definition, executor, random_tensors

from kvik.models.config import ModelConfig, RopeConfig
from kvik.models.rope import rope_table
from kvik.ops import Activation, Experts, Ops
from kvik.ops.native_ops import NativeExecutor
from kvik.ops.torch_ops import TorchExecutor
from kvik.weights.layouts import Layout
from kvik.weights.packed import PackedTensor


@dataclass(frozen=True)
class Recipe:
    """What a family decides. Layers with a window rotate by the last of the thetas, the others by the first."""

    name: str
    hidden: int = 64
    inner: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    vocab: int = 61
    windows: tuple[int | None, ...] = (None, None)
    thetas: tuple[float, ...] = (10000.0,)
    scale: float | None = None
    embed_scale: float = 1.0
    positions: int = 0  # rows of a learned table; 0: none
    norm: Literal["rms", "layer"] = "rms"
    biased: frozenset[str] = frozenset()
    qk_norm: Literal["", "heads", "whole"] = ""
    post_norms: bool = False
    network: Literal["gate", "plain", "experts"] = "gate"
    activation: Activation = "silu"
    experts: int = 8
    used: int = 2
    normalize: bool = True

    @property
    def config(self) -> ModelConfig:
        return config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.inner, num_layers=len(self.windows),
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_size=self.head_size, windows=self.windows,
        )  # fmt: skip

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        d, q, kv, f = self.hidden, self.heads * self.head_size, self.kv_heads * self.head_size, self.inner
        e = self.experts
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab, d), "norm": (d,), "norm.bias": (d,)}
        if self.positions:
            shapes["positions"] = (self.positions, d)
        for i in range(len(self.windows)):
            layer: dict[str, tuple[int, ...]] = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
            if self.network == "experts":
                layer |= {"router": (e, d), "gates": (e * f, d), "ups": (e * f, d), "downs": (e * d, f)}
            else:
                layer |= {"gate": (f, d), "up": (f, d), "down": (d, f)}
            layer |= {f"{name}.bias": (layer[name][0],) for name in self.biased}
            for name in ("attn_norm", "ffn_norm", "attn_post", "ffn_post"):
                layer |= {name: (d,), f"{name}.bias": (d,)}
            sizes = (self.head_size, self.head_size) if self.qk_norm == "heads" else (q, kv)
            layer |= {"q_norm": (sizes[0],), "k_norm": (sizes[1],)}
            shapes |= {f"{i}.{name}": shape for name, shape in layer.items()}
        return shapes

    def forward(self, ops: Ops[Any], c: ModelConfig) -> None:
        x = ops.embed("embed", self.embed_scale)
        if self.positions:
            x = ops.add(x, ops.embed_positions("positions"))
        for i, window in enumerate(self.windows):
            n = f"{i}."
            h = self._norm(ops, x, n + "attn_norm")
            q = self._head(ops, self._linear(ops, h, n + "q"), n + "q_norm", self.heads, window)
            k = self._head(ops, self._linear(ops, h, n + "k"), n + "k_norm", self.kv_heads, window)
            v = self._linear(ops, h, n + "v")
            y = self._linear(ops, ops.attend(q, k, v, i, window, self.scale), n + "o")
            x = ops.add(x, self._norm(ops, y, n + "attn_post") if self.post_norms else y)
            y = self._network(ops, self._norm(ops, x, n + "ffn_norm"), n)
            x = ops.add(x, self._norm(ops, y, n + "ffn_post") if self.post_norms else y)
        ops.logits(self._norm(ops, x, "norm"), "embed")

    def _norm(self, ops: Ops[Any], x: Any, name: str) -> Any:
        if self.norm == "layer":
            return ops.layer_norm(x, name, name + ".bias", 1e-5)
        return ops.rms_norm(x, name, 1e-6)

    def _linear(self, ops: Ops[Any], x: Any, name: str) -> Any:
        return ops.linear(x, name, name + ".bias" if name.split(".")[1] in self.biased else None)

    def _head(self, ops: Ops[Any], x: Any, norm: str, heads: int, window: int | None) -> Any:
        if self.qk_norm:
            x = ops.rms_norm(x, norm, 1e-6, heads if self.qk_norm == "heads" else 1)
        if not self.thetas:
            return x
        theta = self.thetas[0] if window is None else self.thetas[-1]
        return ops.rope(x, heads, rope_table(RopeConfig(theta=theta), self.head_size, 512))

    def _network(self, ops: Ops[Any], h: Any, n: str) -> Any:
        if self.network == "plain":
            return self._linear(ops, ops.activate(self._linear(ops, h, n + "up"), self.activation), n + "down")
        if self.network == "gate":
            both = self._linear(ops, h, n + "gate"), self._linear(ops, h, n + "up")
            return self._linear(ops, ops.gate(*both, self.activation), n + "down")
        names = n + "gates", n + "ups", n + "downs"
        e = Experts(*names, self.experts, self.used, self.normalize, self.activation)
        return ops.experts(h, ops.linear(h, n + "router"), e)

    def weights(self, layout: Layout, seed: int = 0) -> dict[str, PackedTensor]:
        made = random_tensors(self.shapes, layout, seed)
        routers = {name: shape for name, shape in self.shapes.items() if name.endswith("router")}
        return made | random_tensors(routers, Layout.F32, seed)

    def native(self, weights: dict[str, PackedTensor], **how: Any) -> NativeExecutor:
        return executor(self.config, weights, self.forward, **how)

    def torch(self, weights: dict[str, PackedTensor], **how: Any) -> TorchExecutor[ModelConfig]:
        return definition(self.config, weights, self.forward, **how)


GPT2_LINEARS = frozenset({"q", "k", "v", "o", "up", "down"})
GEMMA = Recipe(
    "gemma", windows=(20, 70, None), thetas=(1e6, 10000.0), scale=0.2, embed_scale=8.0, kv_heads=1, qk_norm="heads",
    post_norms=True, activation="gelu_tanh",
)  # fmt: skip
GPT2 = Recipe(
    "gpt2", hidden=80, inner=112, heads=3, kv_heads=3, thetas=(), positions=256, norm="layer", biased=GPT2_LINEARS,
    network="plain", activation="gelu_tanh",
)  # fmt: skip
MOE = Recipe("moe", network="experts", qk_norm="heads", inner=48)
RECIPES = (
    Recipe("qwen2", biased=frozenset("qkv"), head_size=32),
    Recipe("qwen3", qk_norm="heads", head_size=48),
    GEMMA,
    GPT2,
    MOE,
    replace(MOE, name="moe-many", experts=33, used=5, normalize=False, activation="gelu_tanh", inner=32, hidden=96),
    Recipe("moe-one", network="experts", used=1, norm="layer", post_norms=True),
    Recipe("whole-norms", qk_norm="whole", heads=2, kv_heads=1, head_size=80, biased=frozenset({"v", "o", "gate"})),
)


def random_recipe(seed: int) -> Recipe:
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    kv_heads = pick(1, 2, 3)
    network = pick("gate", "plain", "experts")
    positions = pick(0, 300)
    names = {"gate": "qkvo gate up down", "plain": "qkvo up down", "experts": "qkvo"}[network].split()
    linears = [*names[0], *names[1:]]
    experts = pick(1, 3, 16, 40)
    return Recipe(
        f"random-{seed}", hidden=16 * pick(1, 2, 5), inner=16 * pick(1, 3, 6), heads=kv_heads * pick(1, 2, 4),
        kv_heads=kv_heads, head_size=16 * pick(1, 2, 3), windows=tuple(pick(None, 1, 17, 64) for _ in range(2)),
        thetas=pick((), (500.0,), (1e6, 100.0)), scale=pick(None, 0.3), embed_scale=pick(1.0, 3.7), positions=positions,
        norm=pick("rms", "layer"), biased=frozenset(n for n in linears if rng.random() < 0.4),
        qk_norm=pick("", "heads", "whole"), post_norms=bool(pick(0, 1)), network=network,
        activation=pick("silu", "gelu_tanh"), experts=experts, used=min(experts, pick(1, 2, 7)), normalize=bool(pick(0, 1)),
    )  # fmt: skip
