"""What is measured in a block: one job per engine and setting, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench import contenders
from bench.contenders import Measurement, Settings
from bench.peers import VARIANTS

KVIK = "kvik"
FLASH = (0, 1)
OPENVINO = (("Q4_1", "PA"), ("Q4_1", "SDPA"), ("Q4_0", "PA"))


class Job(NamedTuple):
    """measure takes the block's number; needs raises BenchError for a peer or file that is missing."""

    measure: Callable[[int], Measurement]
    needs: Callable[[], object]


def check(jobs: Mapping[str, Job], names: Iterable[str]) -> None:
    """Refuse at once, in one line, what cannot be measured for want of a peer."""
    for name in names:
        jobs[name].needs()


def kvik(settings: Settings, model: Callable[[], Path]) -> Job:
    """Kvik on a file or folder: prefill and decode. model() raises where it is missing."""

    def of_model() -> Settings:
        return replace(settings, model=model())

    return Job(lambda block: contenders.kvik(of_model()), lambda: of_model().need_kvik())


def llama(settings: Settings, prefix: str, model: Callable[[], Path]) -> dict[str, Job]:
    """llama.cpp on a file, without and with flash attention: prefill and decode. model() raises where it is missing."""

    def job(flash: int) -> Job:
        return of_llama(settings, model, lambda block: contenders.llama(settings, model(), flash))

    return {f"{prefix} fa={flash}": job(flash) for flash in FLASH}


def of_llama(settings: Settings, model: Callable[[], Path], measure: Callable[[int], Measurement]) -> Job:
    return Job(measure, lambda: (settings.peers.llama("llama-bench"), model()))


def bandwidth(settings: Settings) -> Job:
    return Job(lambda block: contenders.bandwidth(settings), settings.peers.bandwidth)


def default_model(settings: Settings) -> dict[str, Job]:
    """Every engine on the default model, starts and decode beside a busy process.

    Names begin with what --only and --skip go by.
    """
    peers = settings.peers

    def variant(name: str) -> Callable[[], Path]:
        return lambda: peers.variant(name)

    def on_same_file(measure: Callable[[int], Measurement]) -> Job:
        return of_llama(settings, variant("Q4_1"), measure)

    def deep(flash: int) -> Job:
        return on_same_file(lambda block: contenders.decode_llama(settings, settings.depth, flash))

    found = {"bandwidth": bandwidth(settings), KVIK: kvik(settings, lambda: settings.model)}
    for name in VARIANTS:
        found |= llama(settings, f"llama.cpp {name}", variant(name))
    found |= {f"openvino {name} {backend}": openvino(settings, name, backend) for name, backend in OPENVINO}
    found |= {
        "transformers bf16": Job(
            lambda block: contenders.transformers(settings),
            lambda: (peers.python("transformers"), peers.dequantized()),
        ),
        "start kvik": Job(lambda block: contenders.start_kvik(settings), settings.need_kvik),
        "start llama.cpp": on_same_file(lambda block: contenders.start_llama(settings)),
        "foreign kvik": Job(
            lambda block: contenders.foreign(settings, block, lambda: contenders.decode_kvik(settings)),
            settings.need_kvik,
        ),
        "foreign llama.cpp": on_same_file(
            lambda block: contenders.foreign(settings, block, lambda: contenders.decode_llama(settings))
        ),
    }
    if settings.depth:
        found["depth kvik"] = Job(lambda block: contenders.decode_kvik(settings, settings.depth), settings.need_kvik)
        found |= {f"depth llama.cpp Q4_1 fa={flash}": deep(flash) for flash in FLASH}
    return found


def openvino(settings: Settings, name: str, backend: str) -> Job:
    return Job(
        lambda block: contenders.openvino(settings, name, backend),
        lambda: (settings.peers.python("openvino"), settings.peers.variant(name)),
    )
