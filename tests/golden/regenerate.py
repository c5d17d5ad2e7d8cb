"""Write the golden files: inputs, and the literal bytes of the caches that hold them, for every mode.

Row containers have a file of their own, made from the inputs of the first.

Run ``python -m tests.golden.regenerate`` when, and only when, the format version changes.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np

from kvq_core import CacheLayout
from kvq_core.layout import FORMAT_VERSION
from tests import cases
from tests import inputs as make
from tests.backends import NUMPY

FILE = Path(__file__).with_name(f"format{FORMAT_VERSION}.npz")
ROW_FILE = FILE.with_stem(f"{FILE.stem}-row")
KV_CACHE_DTYPES = (*cases.MODES, "int8_per_token_head/fp8_e4m3")
ROW_KV_CACHE_DTYPES = (*cases.ROW_MODES[:4], "bfloat16")
PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V = 5, 2, 32, 16
SCALES = (0.37, 1.7)  # of per-tensor modes


def layout_of(kv_cache_dtype: str, rows: str | None = None) -> CacheLayout:
    return cases.layout_of(kv_cache_dtype, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_V, rows)


def name_of(kv_cache_dtype: str, dtype: str, rows: str | None = None) -> str:
    """The name in the file of the pages that ``dtype`` rows make."""
    return f"{rows or 'pages'}-{kv_cache_dtype.replace('/', '+')}-from-{dtype}"


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


def make_pages(
    backend, golden: dict[str, np.ndarray], kv_cache_dtype: str, dtype: str, rows: str | None = None
) -> np.ndarray:
    """What ``backend`` makes of the inputs in a fresh cache."""
    layout = layout_of(kv_cache_dtype, rows)
    k, v, slots = inputs_of(golden, dtype)
    fresh = np.zeros(layout.shape(-(-(len(k) + 3) // PAGE_SIZE)), np.uint8)
    return backend.append(layout, fresh, k, v, slots, SCALES)


def make_golden() -> dict[str, np.ndarray]:
    """Everything in the first file, by name."""
    golden = make_inputs()
    for kv_cache_dtype in KV_CACHE_DTYPES:
        for dtype in cases.DTYPES:
            golden[name_of(kv_cache_dtype, dtype)] = make_pages(NUMPY, golden, kv_cache_dtype, dtype)
    return golden


def make_golden_rows() -> dict[str, np.ndarray]:
    """Everything in the file of row containers, by name."""
    golden = make_inputs()
    return {
        name_of(mode, dtype, rows): make_pages(NUMPY, golden, mode, dtype, rows)
        for rows, mode, dtype in itertools.product(cases.ROW_ORDERS, ROW_KV_CACHE_DTYPES, cases.DTYPES)
    }


def load_golden(path: Path = FILE) -> dict[str, np.ndarray]:
    """A file as committed."""
    with np.load(path) as file:
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
    """Write the files and print their digests."""
    for path, golden in ((FILE, make_golden()), (ROW_FILE, make_golden_rows())):
        np.savez_compressed(path, **golden)
        print(f"{path.name}: {len(golden)} arrays, {path.stat().st_size} bytes on disk, sha256 {digest(golden)}")


if __name__ == "__main__":
    main()
