"""Execute launch plans on numpy arrays with the Triton interpreter: no framework, no GPU.

Works where the kernels were decorated under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers the names of its dtypes with numpy)
import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpretedFunction

from kvq_core import kernels
from kvq_core.plan import LaunchPlan


def is_interpreting() -> bool:
    """Whether the kernels of this process run in the interpreter."""
    return isinstance(kernels.append_kv, InterpretedFunction)


def run(plan: LaunchPlan, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Execute ``plan`` on ``arrays``; return its outputs, those that alias an input as updated copies.

    Raises:
        RuntimeError: the kernels of this process are compiled ones.
    """
    if not is_interpreting():
        raise RuntimeError("expected interpreted kernels: set TRITON_INTERPRET=1 before kvq_core.kernels is imported")
    arrays = [np.ascontiguousarray(array) for array in arrays]
    outputs = [
        np.empty(output.shape, output.dtype) if output.alias is None else arrays[output.alias].copy()
        for output in plan.outputs
    ]
    inputs = list(arrays)
    for output, buffer in zip(plan.outputs, outputs, strict=True):
        if output.alias is not None:
            inputs[output.alias] = buffer
    function = getattr(kernels, plan.kernel)
    executor = _NumpyExecutor(function.rewrite(), function.arg_names, plan.grid)
    with np.errstate(all="ignore"):  # a GPU raises no floating-point exceptions either
        executor(*map(_Buffer, inputs), *plan.scalars, *map(_Buffer, outputs), **dict(plan.constexprs))
    return outputs


class _Buffer:
    """What the interpreter asks of a tensor: an address and a dtype."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data


class _NumpyExecutor(GridExecutor):
    """The interpreter's grid loop without its copies between devices, which need torch."""

    def _init_args_hst(self, args_dev: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return args_dev, kwargs

    def _restore_args_dev(self, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        pass
