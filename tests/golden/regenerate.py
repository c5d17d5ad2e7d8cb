"""Write the golden file: inputs, and the literal bytes of the caches that hold them, for every mode.

Run ``python -m tests.golden.regenerate`` when, and only when, the format version changes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from kvq_core import CacheLayout
from kvq_core.layout import FORMAT_VERSION
from tests import cases
from tests import inputs as make
from tests.backends import NUMPY

FILE = Path(__file__).with_name(f"format{FORMAT_VERSION}.npz")
KV_CACHE_DTYPES = (*cases.MODES, "int8_per_token_head/fp8_e4m3")
PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V = 5, 2, 32, 16
SCALES = (0.37, 1.7)  # of per-tensor modes


def layout_of(kv_cache_dtype: str) -> CacheLayout:
    return CacheLayout(
        kv_cache_dtype, page_size=PAGE_SIZE, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, head_dim_v=HEAD_DIM_V
    )


def name_of(kv_cache_dtype: str, dtype: str) -> str:
    """The name in the file of the pages that ``dtype`` rows make."""
    return f"pages-{kv_cache_dtype.replace('/', '+')}-from-{dtype}"


def make_inputs() -> dict[str, np.ndarray]:
    """Rows of every dtype as unsigned integers (npz knows no bfloat16), and their slots: shuffled, some dropped."""
    rng = make.generator("golden")
    arrays = {}
    for dtype in cases.DTYPES:
        k = make.edge_tokens(rng, dtype, NUM_KV_HEADS, HEAD_DIM)
        v = make.edge_tokens(rng, dtype, NUM_KV_HEADS, HEAD_DIM_V)[: len(k)]
        slots = rng.permutation(len(k) + 3).astype(np.int32)[: len(k)]
        slots[[3, 11]] = -1, 10**6
        arrays |= {f"k-{dtype}": _bits(k[: len(v)]), f"v-{dtype}": _bits(v), f"slots-{dtype}": slots[: len(v)]}
    return arrays


def inputs_of(golden: dict[str, np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, v and slots of rows of ``dtype``."""
    k, v = (golden[f"{name}-{dtype}"].view(dtype) for name in "kv")
    return k, v, golden[f"slots-{dtype}"]


def make_pages(backend, golden: dict[str, np.ndarray], kv_cache_dtype: str, dtype: str) -> np.ndarray:
    """What ``backend`` makes of the inputs in a fresh cache."""
    layout = layout_of(kv_cache_dtype)
    k, v, slots = inputs_of(golden, dtype)
    fresh = np.zeros(layout.shape(-(-(len(k) + 3) // PAGE_SIZE)), np.uint8)
    return backend.append(layout, fresh, k, v, slots, SCALES)


def make_golden() -> dict[str, np.ndarray]:
    """Everything in the file, by name."""
    golden = make_inputs()
    for kv_cache_dtype in KV_CACHE_DTYPES:
        for dtype in cases.DTYPES:
            golden[name_of(kv_cache_dtype, dtype)] = make_pages(NUMPY, golden, kv_cache_dtype, dtype)
    return golden


def load_golden() -> dict[str, np.ndarray]:
    """The file as committed."""
    with np.load(FILE) as file:
        return dict(file)


def digest(golden: dict[str, np.ndarray]) -> str:
    """SHA-256 over names and bytes, independent of how npz packs them."""
    sha = hashlib.sha256()
    for name in sorted(golden):
        sha.update(f"{name} {golden[name].dtype} {golden[name].shape}".encode() + golden[name].tobytes())
    return sha.hexdigest()


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.itemsize}")


def main() -> None:
    """Write the file and print its digest."""
    golden = make_golden()
    np.savez_compressed(FILE, **golden)
    print(f"{FILE.name}: {len(golden)} arrays, {FILE.stat().st_size} bytes on disk, sha256 {digest(golden)}")


if __name__ == "__main__":
    main()
