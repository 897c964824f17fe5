"""Which executors there are, and a loaded model made ready to run on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from kvik import _native
from kvik.cache.storage import PoolSize, allocate_cache
from kvik.errors import DataError, ParameterError, TryAgainError
from kvik.models import MODELS
from kvik.models.loading import LoadedModel
from kvik.ops import Executor, Rounding, fine_input
from kvik.weights.layouts import input_rounding
from kvik.weights.packed import PackedTensor

__all__ = ["EXECUTORS", "ExecutorName", "build_executor", "check_device", "input_roundings"]

ExecutorName = Literal["native", "torch"]
EXECUTORS: tuple[ExecutorName, ...] = get_args(ExecutorName)


def check_device(executor: ExecutorName, device: object) -> None:
    """ParameterError for a device the executor does not run on; whether a GPU is there is seen when it is built."""
    if executor == "native" and device != "cpu":
        raise ParameterError(f"device must be 'cpu' with the native executor, got {device!r}")
    if device not in ("cpu", "cuda"):
        raise ParameterError(f"device must be 'cpu' or 'cuda', got {device!r}")


def build_executor(
    executor: ExecutorName,
    loaded: LoadedModel,
    size: PoolSize,
    *,
    threads: int,
    max_rows: int,
    device: str,
) -> Executor:
    """The model on an executor, with storage for a pool of this size. max_rows: most tokens of a pass (native).

    Raises ParameterError (PyTorch or device missing, unknown KVIK_ISA), DataError (sizes the native kernels lack) or
    TryAgainError (the system gives no more threads).
    """
    if executor == "native":
        return _native_executor(loaded, size, threads, max_rows)
    return _torch_executor(loaded, size, threads, device)


def _native_executor(loaded: LoadedModel, size: PoolSize, threads: int, max_rows: int) -> Executor:
    from kvik.ops.native_ops import NativeExecutor

    try:
        _native.isa_selected()
    except ValueError as error:  # KVIK_ISA names what is not here
        raise ParameterError(str(error)) from None
    try:
        pool = _native.Pool(threads)
    except RuntimeError as error:  # the system gives no more threads
        raise TryAgainError(f"{error}; fewer threads may do") from None
    storage = allocate_cache(size.nbytes)
    try:
        return NativeExecutor(
            loaded.config, MODELS[loaded.config.family].forward, loaded.weights.tensors,
            pool=pool, kv=storage, max_rows=max_rows,
        )  # fmt: skip
    except ValueError as error:  # sizes its kernels do not have
        raise DataError(f'the native executor cannot run it: {error}; executor "torch" may', path=loaded.path) from None


def input_roundings(tensors: Mapping[str, PackedTensor]) -> dict[str, Rounding]:
    """How the linears of these weights round their inputs, by name; those that do not are left out."""
    kinds = {name: input_rounding(t.layout) for name, t in tensors.items() if not t.vector}
    return {name: Rounding(kind, fine_input(name)) for name, kind in kinds.items() if kind is not None}


def _torch_executor(loaded: LoadedModel, size: PoolSize, threads: int, device: str) -> Executor:
    try:
        import torch

        from kvik.ops.torch_ops import TorchExecutor
    except ImportError as error:
        raise ParameterError('executor "torch" needs PyTorch: pip install "kvik[torch]"') from error
    if device == "cuda" and not torch.cuda.is_available():
        raise ParameterError("device 'cuda' is not available here")
    if device == "cpu":
        torch.set_num_threads(threads)
    tensors = loaded.weights.tensors
    return TorchExecutor(
        loaded.config, MODELS[loaded.config.family].forward, {n: t.floats() for n, t in tensors.items()},
        rounding=input_roundings(tensors), kv_bytes=size.nbytes, device=device,
    )  # fmt: skip
