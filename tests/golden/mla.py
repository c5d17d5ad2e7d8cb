"""Write the golden file of MLA caches: inputs, and the literal bytes of the pages that hold them, for every mode.

Run ``python -m tests.golden.mla`` when, and only when, the format version changes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvq_core import MLALayout
from kvq_core.layout import FORMAT_VERSION
from kvq_core.mla import MLA_MODES
from tests import cases
from tests import inputs as make
from tests.backends import NUMPY
from tests.golden import regenerate

FILE = Path(__file__).with_name(f"format{FORMAT_VERSION}-mla.npz")
PAGE_SIZE, KV_LORA_RANK, ROPE_DIM = 7, 48, 16
SCALES = (0.37, 0.37)  # one for both parts, of fp8_e4m3


def layout_of(mode: str) -> MLALayout:
    return MLALayout(mode, page_size=PAGE_SIZE, kv_lora_rank=KV_LORA_RANK, rope_dim=ROPE_DIM)


def make_inputs() -> dict[str, np.ndarray]:
    """Rows of every dtype as unsigned integers, the latent and the rope part, and their slots."""
    rng = make.generator("golden-mla")
    arrays = {}
    for dtype in cases.DTYPES:
        kv_c = make.edge_tokens(rng, dtype, 1, KV_LORA_RANK)
        k_pe = np.resize(make.edge_tokens(rng, dtype, 1, ROPE_DIM), (len(kv_c), 1, ROPE_DIM))
        slots = rng.permutation(len(kv_c) + 3).astype(np.int32)[: len(kv_c)]
        slots[[3, 11]] = -1, 10**6
        arrays |= {f"k-{dtype}": regenerate._bits(kv_c), f"v-{dtype}": regenerate._bits(k_pe), f"slots-{dtype}": slots}
    return arrays


def make_pages(backend, golden: dict[str, np.ndarray], mode: str, dtype: str) -> np.ndarray:
    """What ``backend`` makes of the inputs in a fresh cache."""
    layout = layout_of(mode)
    kv_c, k_pe, slots = regenerate.inputs_of(golden, dtype)
    fresh = np.zeros(layout.shape(-(-(len(kv_c) + 3) // PAGE_SIZE)), np.uint8)
    return backend.append(layout, fresh, kv_c, k_pe, slots, SCALES)


def make_golden() -> dict[str, np.ndarray]:
    """Everything in the file, by name."""
    golden = make_inputs()
    for mode in MLA_MODES:
        for dtype in cases.DTYPES:
            golden[regenerate.name_of(mode, dtype)] = make_pages(NUMPY, golden, mode, dtype)
    return golden


def load_golden() -> dict[str, np.ndarray]:
    """The file as committed."""
    with np.load(FILE) as file:
        return dict(file)


def main() -> None:
    """Write the file and print its digest."""
    golden = make_golden()
    np.savez_compressed(FILE, **golden)
    size = FILE.stat().st_size
    print(f"{FILE.name}: {len(golden)} arrays, {size} bytes on disk, sha256 {regenerate.digest(golden)}")


if __name__ == "__main__":
    main()
