"""The backends under one small protocol, numpy arrays in and out, and which of them run in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import pytest

from kvq_core import CacheLayout, MLALayout, reference
from kvq_core.codec import encode_rows
from kvq_core.modes import get_kv_quant_mode
from tests import inputs as make
from tests.compare import Attention

Scales = tuple[float, float]
Layout = CacheLayout | MLALayout


class Backend(Protocol):
    """Pages that come back are the same view of a copied buffer, so that what lies between pages is compared too.

    With an `MLALayout` these are the MLA ops: k is the latent, v the rope part, both with an axis for their one head.
    """

    @property
    def name(self) -> str: ...

    @property
    def takes_strides(self) -> bool: ...

    def append(self, layout: Layout, pages, k, v, slots, scales: Scales) -> np.ndarray: ...

    def gather(self, layout: Layout, pages, page_table, seq_lens, dtype: str, scales: Scales) -> tuple: ...

    def copy_pages(self, layout: Layout, pages, src, dst) -> np.ndarray: ...

    def attention(self, layout: Layout, inputs: Any, options: dict[str, Any]) -> Attention: ...

    def merge_states(self, outs: Any, lses: Any) -> Attention: ...


@dataclass(frozen=True)
class NumpyBackend:
    """The specification."""

    name: str = "numpy"
    takes_strides: bool = True

    def append(self, layout, pages, k, v, slots, scales):
        pages = make.copy_view(pages)
        if isinstance(layout, MLALayout):
            reference.append_mla(layout, pages, k[:, 0], v[:, 0], slots, scales[0])
        else:
            reference.append_kv(layout, pages, k, v, slots, *scales)
        return pages

    def gather(self, layout, pages, page_table, seq_lens, dtype, scales):
        if isinstance(layout, MLALayout):
            sides = reference.gather_mla(layout, pages, page_table, seq_lens, scales[0])
            values = tuple(side[:, :, None] for side in sides)
        else:
            values = reference.gather_kv(layout, pages, page_table, seq_lens, *scales)
        return tuple(encode_rows(x, get_kv_quant_mode(dtype))[0] for x in values)

    def copy_pages(self, layout, pages, src, dst):
        pages = make.copy_view(pages)
        reference.copy_pages(pages, src, dst)
        return pages

    def attention(self, layout, inputs, options):
        q, pages, page_table, seq_lens, *_ = inputs
        if isinstance(layout, MLALayout):
            scale = {"k_scale": inputs.k_scale, "cu_seqlens_q": inputs.cu_seqlens_q}
            return Attention(*reference.mla_attention(layout, q, pages, page_table, seq_lens, **scale, **options))
        arrays = {name: getattr(inputs, name) for name in OPTIONAL_ARRAYS}
        scales = {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
        return Attention(
            *reference.paged_attention(layout, q, pages, page_table, seq_lens, **arrays, **scales, **options)
        )

    def merge_states(self, outs, lses):
        return Attention(*reference.merge_states(outs, lses))


OPTIONAL_ARRAYS = ("cu_seqlens_q", "sinks", "alibi_slopes")


def _optional_arrays(layout: Layout) -> tuple[str, ...]:
    return OPTIONAL_ARRAYS[:1] if isinstance(layout, MLALayout) else OPTIONAL_ARRAYS


@dataclass(frozen=True)
class TorchBackend:
    """kvq_torch; ``impl`` "eager" or "triton"."""

    name: str
    impl: str
    device: str
    takes_strides: bool = True

    def append(self, layout, pages, k, v, slots, scales):
        import kvq_torch

        cache = self._cache(layout, pages, scales)
        k, v, slots = (to_torch(x, self.device) for x in (k, v, slots))
        if isinstance(layout, MLALayout):
            kvq_torch.append_mla_(cache, k[:, 0], v[:, 0], slots, impl=self.impl)
        else:
            kvq_torch.append_kv_(cache, k, v, slots, impl=self.impl)
        return _from_torch_view(cache.pages, pages)

    def gather(self, layout, pages, page_table, seq_lens, dtype, scales):
        import torch

        import kvq_torch

        cache = self._cache(layout, pages, scales)
        arrays = (to_torch(x, self.device) for x in (page_table, seq_lens))
        if isinstance(layout, MLALayout):
            return tuple(from_torch(x)[:, :, None] for x in kvq_torch.gather_mla(cache, *arrays, impl=self.impl))
        return tuple(map(from_torch, kvq_torch.gather_kv(cache, *arrays, dtype=getattr(torch, dtype), impl=self.impl)))

    def copy_pages(self, layout, pages, src, dst):
        import kvq_torch

        cache = self._cache(layout, pages)
        kvq_torch.copy_pages_(cache, *(to_torch(x, self.device) for x in (src, dst)), impl=self.impl)
        return _from_torch_view(cache.pages, pages)

    def attention(self, layout, inputs, options):
        import kvq_torch

        cache = self._cache(layout, inputs.pages, (inputs.k_scale, inputs.v_scale))
        q, page_table, seq_lens = (to_torch(x, self.device) for x in (inputs.q, inputs.page_table, inputs.seq_lens))
        optional = {name: getattr(inputs, name) for name in _optional_arrays(layout)}
        arrays = {name: None if x is None else to_torch(x, self.device) for name, x in optional.items()}
        options = {**options, **arrays, "return_lse": True, "impl": self.impl}
        attend = kvq_torch.mla_attention if isinstance(layout, MLALayout) else kvq_torch.paged_attention
        return Attention(*map(from_torch, attend(q, cache, page_table, seq_lens, **options)))

    def merge_states(self, outs, lses):
        import kvq_torch

        states = ([to_torch(x, self.device) for x in parts] for parts in (outs, lses))
        return Attention(*map(from_torch, kvq_torch.merge_states(*states)))

    def _cache(self, layout, pages, scales=(1.0, 1.0)):
        import kvq_torch

        return kvq_torch.KVCache(layout, pages=to_torch(pages, self.device), k_scale=scales[0], v_scale=scales[1])


@dataclass(frozen=True)
class JaxBackend:
    """kvq_jax; ``impl`` "xla" or "triton". JAX arrays are dense: it gets copies of strided inputs."""

    name: str
    impl: str
    takes_strides: bool = False

    def append(self, layout, pages, k, v, slots, scales):
        import kvq_jax

        cache = self._cache(layout, pages, scales)
        if isinstance(layout, MLALayout):
            return np.asarray(kvq_jax.append_mla(cache, k[:, 0], v[:, 0], slots, impl=self.impl).pages)
        return np.asarray(kvq_jax.append_kv(cache, k, v, slots, impl=self.impl).pages)

    def gather(self, layout, pages, page_table, seq_lens, dtype, scales):
        import kvq_jax

        cache = self._cache(layout, pages, scales)
        if isinstance(layout, MLALayout):
            sides = kvq_jax.gather_mla(cache, page_table, seq_lens, impl=self.impl)
            return tuple(np.asarray(side)[:, :, None] for side in sides)
        return tuple(map(np.asarray, kvq_jax.gather_kv(cache, page_table, seq_lens, dtype=dtype, impl=self.impl)))

    def copy_pages(self, layout, pages, src, dst):
        import kvq_jax

        return np.asarray(kvq_jax.copy_pages(self._cache(layout, pages), src, dst, impl=self.impl).pages)

    def attention(self, layout, inputs, options):
        import kvq_jax

        cache = self._cache(layout, inputs.pages, (inputs.k_scale, inputs.v_scale))
        arrays = {name: getattr(inputs, name) for name in _optional_arrays(layout)}
        options = {**options, **arrays, "return_lse": True, "impl": self.impl}
        attend = kvq_jax.mla_attention if isinstance(layout, MLALayout) else kvq_jax.paged_attention
        results = attend(inputs.q, cache, inputs.page_table, inputs.seq_lens, **options)
        return Attention(*map(np.asarray, results))

    def merge_states(self, outs, lses):
        import kvq_jax

        return Attention(*map(np.asarray, kvq_jax.merge_states(outs, lses)))

    def _cache(self, layout, pages, scales=(1.0, 1.0)):
        import kvq_jax

        return kvq_jax.KVCache.create(layout, pages=pages, k_scale=scales[0], v_scale=scales[1])


NUMPY = NumpyBackend()
IN_PROCESS = (TorchBackend("torch-eager", "eager", "cpu"), JaxBackend("jax-xla", "xla"))
INTERPRETED = (TorchBackend("torch-interpreter", "triton", "cpu"), JaxBackend("jax-interpreter", "triton"))
COMPILED = (TorchBackend("torch-triton", "triton", "cuda"), JaxBackend("jax-triton", "triton"))
ON_GPU = (*COMPILED, TorchBackend("torch-eager-gpu", "eager", "cuda"))
ALL = (*IN_PROCESS, *INTERPRETED, *ON_GPU)


def takes_on(backend: Backend, case: Any) -> bool:
    """Whether the conformance tests run ``case`` on ``backend``; see `tests.cases` for the tags."""
    if "gpu" in case.tags:
        return backend in COMPILED
    if backend in INTERPRETED:
        one_of_each = backend.name == "torch-interpreter" or "callback" in case.tags
        return one_of_each and not case.tags & {"large", "sweep"}
    return backend.name != "jax-xla" or "sweep" not in case.tags


def lacks_strides(backend: Backend, case: Any) -> bool:
    """Whether the arrays of ``case`` have strides that those of ``backend`` cannot have."""
    strided = getattr(case, "strides", None) or getattr(case, "pool", None)
    return bool(strided) and not backend.takes_strides


def marks_of(backend: Backend) -> tuple:
    """The markers of a test on ``backend``: which process runs it."""
    if backend in ON_GPU:
        return (pytest.mark.gpu,)
    return (pytest.mark.interpreter,) if backend in INTERPRETED else ()


parametrize_backends = pytest.mark.parametrize(
    "backend", [pytest.param(backend, id=backend.name, marks=marks_of(backend)) for backend in ALL]
)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, without starting CUDA."""
    return os.path.exists("/dev/nvidiactl")


def is_interpreting() -> bool:
    """Whether kernels decorated in this process run in the Triton interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def to_torch(x: np.ndarray, device: str):
    """``x`` as a tensor with the same strides into a copy of its whole buffer."""
    import torch

    if x.size == 0:
        return torch.empty(x.shape, dtype=getattr(torch, x.dtype.name), device=device)
    buffer = make.root(x)
    flat = torch.from_numpy(buffer.reshape(-1).view(np.uint8).copy()).to(device).view(getattr(torch, x.dtype.name))
    offset = (x.__array_interface__["data"][0] - buffer.__array_interface__["data"][0]) // x.itemsize
    return flat.as_strided(x.shape, [stride // x.itemsize for stride in x.strides], offset)


def from_torch(tensor) -> np.ndarray:
    """A dense numpy copy of a tensor."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().view(dtype).reshape(tensor.shape)


def _from_torch_view(tensor, like: np.ndarray) -> np.ndarray:
    """The numpy view of a copy of the tensor's whole buffer that has the strides of ``like``."""
    buffer = tensor.as_strided((tensor.untyped_storage().nbytes(),), (1,), 0).cpu().numpy()
    offset = tensor.storage_offset()
    return np.ndarray(like.shape, like.dtype, buffer.reshape(make.root(like).shape), offset, like.strides)
