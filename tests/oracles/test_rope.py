"""Rotary frequencies against transformers and against the formulas' landmarks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvik.errors import ParameterError
from kvik.models.config import RopeConfig
from kvik.models.hf_config import config_from_hf
from kvik.models.rope import rope_table

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default-theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3.1": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3.2": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-of-context": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn-betas": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 48.0,
        "beta_slow": 3.0,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    "yarn-edges-meet": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
    "yarn-of-context": {"rope_type": "yarn", "factor": 2.0},
}


def oracle(rope: dict[str, Any], head_size: int, context: int) -> tuple[np.ndarray[Any, Any], float, dict[str, Any]]:
    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        head_dim=head_size,
        max_position_embeddings=context,
        rope_parameters=dict({"rope_theta": 10000.0} | rope),
    )
    if rope["rope_type"] == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return inv_freq.double().numpy(), factor, config.to_dict() | {"architectures": ["LlamaForCausalLM"]}


def hf_rope(config: dict[str, Any]) -> RopeConfig:
    rope = config_from_hf(config, "config.json").rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str, head_size: int) -> None:
    context = 16384
    inv_freq, factor, config = oracle(CASES[case], head_size, context)
    table = rope_table(hf_rope(config), head_size, context)
    assert table.inv_freq.dtype == np.float64 and table.inv_freq.shape == (head_size // 2,)
    # transformers computes in float32; the low edge of llama3's blend cancels, and a factor of 32 magnifies the rest.
    np.testing.assert_allclose(table.inv_freq, inv_freq, rtol=2e-6 if case == "llama3.2" else 1e-6)
    assert table.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("default")])
def test_scaling_changes_the_frequencies(case: str) -> None:
    _, _, config = oracle(CASES[case], 64, 16384)
    plain = rope_table(RopeConfig(theta=CASES[case].get("rope_theta", 10000.0)), 64, 16384)
    assert np.abs(rope_table(hf_rope(config), 64, 16384).inv_freq / plain.inv_freq - 1).max() > 0.1


def test_divisors_divide_the_plain_frequencies() -> None:
    divisors = tuple(1.0 + i for i in range(8))
    table = rope_table(RopeConfig(theta=100.0, divisors=divisors), 16, 1024)
    expected = [100.0 ** (-2 * i / 16) / (1 + i) for i in range(8)]
    np.testing.assert_allclose(table.inv_freq, expected, rtol=1e-15)
    assert table.factor == 1.0


def test_yarn_factor_is_the_papers() -> None:
    table = rope_table(RopeConfig(kind="yarn", factor=16.0, original_context=4096), 64, 65536)
    assert table.factor == pytest.approx(0.1 * math.log(16.0) + 1.0)
    assert rope_table(RopeConfig(kind="yarn", factor=1.0), 64, 4096).factor == 1.0


@pytest.mark.parametrize(
    ("rope", "head_size", "message"),
    [
        (RopeConfig(), 15, "even"),
        (RopeConfig(), 0, "even"),
        (RopeConfig(divisors=(1.0,) * 7), 16, "8 finite positive"),
        (RopeConfig(divisors=(1.0,) * 7 + (0.0,)), 16, "8 finite positive"),
        (RopeConfig(divisors=(1.0,) * 7 + (math.nan,)), 16, "8 finite positive"),
        (RopeConfig(kind="dynamic"), 16, "dynamic"),  # type: ignore[arg-type]
    ],
)
def test_what_has_no_formula_is_refused(rope: RopeConfig, head_size: int, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        rope_table(rope, head_size, 1024)
