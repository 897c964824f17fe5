"""What engines over random models keep at a prompt's end, against plain loops over the model's own queries, keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cache.eviction.simulated import Numbers, Shape, Simulation, one_thread
from engine.fakes import run_out
from engine.small_engines import CONFIGS, small_engine

from kvik.cache.eviction import Evictor, Kept
from kvik.engine.engine import Engine
from kvik.ops import torch_ops
from kvik.params import CacheParams, SamplingParams
from kvik.text.tokenizer import Tokenizer
from kvik.weights.layouts import Layout

PROMPT = tuple(int(x) for x in np.random.default_rng(5).integers(0, 96, 90))
POLICIES = ["h2o:budget=25%", "snapkv:budget=40%,window=8,kernel=5", "tova:budget=30%", "keydiff:budget=24", "expectedattention:budget=35%,window=20,future=30"]  # fmt: skip
one_thread = pytest.fixture(autouse=True)(one_thread)


def engine(tokenizer: Tokenizer, name: str, cache: CacheParams, **options: Any) -> Engine:
    return small_engine(tokenizer, name, cache=cache, layout=Layout.F32, **options)


def run(made: Engine) -> None:
    made.add(made.request(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True, seed=1)), lambda chunk: None)
    run_out(made)


@pytest.fixture(scope="module")
def computed(small_tokenizer: Tokenizer) -> dict[str, dict[str, torch.Tensor]]:
    """By model: unrotated and rotated queries [L, n, H, D], keys and values [L, n, H_kv, D] of the prompt."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    attend = torch_ops.TorchOps.attend
    for name, c in CONFIGS.items():
        rows: list[tuple[Any, ...]] = []

        def watching(
            self: Any, q: Any, k: Any, v: Any, layer: int, *rest: Any, rows: Any = rows, size: int = c.head_size
        ) -> Any:
            plain = next(r.x for r in self._rotated if r.value is q)
            rows.append(tuple(x.unflatten(1, (-1, size)).clone() for x in (plain, q, k, v)))
            return attend(self, q, k, v, layer, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_ops.TorchOps, "attend", watching)
            run(engine(small_tokenizer, name, CacheParams(k="f32", v="f32"), definition=True))
        assert len(rows[0][0]) == len(PROMPT)
        whole = zip(*rows[: c.num_layers], strict=True)
        found[name] = dict(zip(("plain", "queries", "keys", "values"), map(torch.stack, whole), strict=True))
    return found


@pytest.mark.parametrize("definition", [True, False], ids=["definition", "native"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("layers", "heads"), [("uniform", "uniform"), ("pyramid", "ada")])
@pytest.mark.parametrize("policy", POLICIES)
def test_kept(
    small_tokenizer: Tokenizer, computed: Any, monkeypatch: pytest.MonkeyPatch, policy: str, layers: str, heads: str,
    name: str, definition: bool,
) -> None:  # fmt: skip
    heads = "uniform" if policy.startswith("tova") else heads
    params = CacheParams(k="f32", v="f32", policy=policy, layers=layers, heads=heads)  # type: ignore[arg-type]
    choices: list[Kept] = []
    choose = Evictor.choose
    monkeypatch.setattr(Evictor, "choose", lambda *given: choices.append(choose(*given)) or choices[-1])
    made = engine(small_tokenizer, name, params, definition=definition, max_batch_tokens=32)
    run(made)
    c, was = CONFIGS[name], computed[name]
    shape = Shape(c.num_layers, c.num_heads, c.num_kv_heads, c.head_size, c.windows)
    numbers = Numbers(was["plain" if policy.startswith("expected") else "queries"], was["keys"], was["values"])
    simulation = Simulation(
        params, len(PROMPT), len(PROMPT), shape=shape, rope=made.admission.model.rope, numbers_=numbers
    )
    simulation.advance(len(PROMPT))
    same = total = 0
    for layer, heads_ in simulation.reference().items():
        for head, tokens in enumerate(heads_):
            kept = choices[0].kept[layer, head, : choices[0].counts[layer, head]].tolist()
            same, total = same + len(set(kept) & set(tokens)), total + len(tokens)
            assert len(kept) == len(tokens) or heads == "ada"
    assert same >= total - 1, f"{total - same} of {total}"  # sums of another order may change what is nearly equal
