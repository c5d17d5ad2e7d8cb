"""What the framework-neutral core may know of JAX: array specs, and the device that will run a program."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kvq_core.arguments import ArraySpec
from kvq_core.plan import DeviceFacts

Array = jax.Array | np.ndarray  # what the public functions take; numpy arrays become JAX arrays

_INTERPRETER_SMS = 4  # small, so that tests on a CPU reach the split and the unsplit paths

_target: contextvars.ContextVar[DeviceFacts | None] = contextvars.ContextVar("kvq_jax_target", default=None)


@contextlib.contextmanager
def target(facts: DeviceFacts) -> Iterator[None]:
    """Trace for the device that ``facts`` describes, e.g. to lower for CUDA on a machine without a GPU.

    ``jax.jit`` caches a trace whatever the target: give each target a function of its own.
    """
    token = _target.set(facts)
    try:
        yield
    finally:
        _target.reset(token)


def platform(pages: jax.Array) -> str:
    """Where an op on ``pages`` runs: ``"cpu"`` or ``"gpu"`` (or another platform of JAX).

    That is the target if one is set, the device of a concrete array, and under a trace the default backend.
    """
    if _target.get() is not None:
        return "gpu"
    if isinstance(pages, jax.core.Tracer):
        return jax.default_backend()
    return next(iter(pages.devices())).platform


def device_facts(pages: jax.Array) -> DeviceFacts:
    """Facts of the device that launches Triton kernels on ``pages``.

    Raises:
        ValueError: there is none, and the Triton interpreter is not switched on either.
    """
    facts = _target.get()
    if facts is not None:
        return facts
    where = platform(pages)
    if where == "gpu":
        return _gpu_facts(jax.devices("gpu")[0])
    if where == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return DeviceFacts("interpreter", 0, _INTERPRETER_SMS)
    raise ValueError(
        f"expected impl='triton' on a GPU; got a cache on {where!r}. Use impl='xla' (the default there), or set "
        "TRITON_INTERPRET=1 before Python starts to run the kernels through the Triton interpreter on the CPU"
    )


def _gpu_facts(device: Any) -> DeviceFacts:
    """``compute_capability`` is "9.0" on NVIDIA and "gfx942" on AMD."""
    arch = str(device.compute_capability)
    if arch.startswith("gfx"):
        major, minor = arch[3:-2], arch[-2]
        return DeviceFacts("hip", int(major) * 10 + int(minor), device.core_count)
    return DeviceFacts("cuda", int(arch.replace(".", "")), device.core_count)


def as_jax(name: str, x: Any) -> jax.Array:
    """Return ``x``, a JAX or numpy array, as a JAX array.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(x, jax.Array):
        return x
    if not isinstance(x, np.ndarray):
        raise TypeError(f"expected {name} to be a JAX or numpy array; got {type(x).__name__}. Use jnp.asarray first")
    if x.dtype == np.int64 and not jax.config.read("jax_enable_x64"):
        # JAX would wrap what int32 cannot hold into a valid index; -1 is skipped, as an index past the pool is.
        x = np.where((x >= -(2**31)) & (x < 2**31), x, -1).astype(np.int32)
    return jnp.asarray(x)


def array_spec(x: jax.Array) -> ArraySpec:
    """The spec of an array or tracer. JAX arrays are dense and row-major to the kernels that receive them."""
    strides = tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))
    return ArraySpec(x.dtype.name, tuple(x.shape), strides)


def optional_spec(x: jax.Array | None) -> ArraySpec | None:
    """`array_spec`, where None stays None."""
    return None if x is None else array_spec(x)


def vary_like(arrays: Any, *inputs: jax.Array) -> Any:
    """Mark arrays as differing between devices wherever ``inputs`` do.

    ``shard_map`` asks this of loop carries, and of the inputs of one call.
    """

    def axes_of(x: Any) -> frozenset[Any]:
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset[Any]().union(*map(axes_of, inputs))

    def vary(x: Any) -> Any:
        missing = tuple(axes - axes_of(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)
