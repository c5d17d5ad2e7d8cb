"""What holds for every test: reproducible properties, and reasons for what cannot run here."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.backends import has_gpu, is_interpreting

if not has_gpu():  # the wheel that jax-triton needs makes JAX look for a GPU
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# PTX names the file of its source, but Triton's cache does not ask for it: a cache of another clone has other bytes.
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).parents[1] / "build" / "triton")

settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")


_TESTS_RUN = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs_in_memory() -> Iterator[None]:
    """Drop what XLA compiled for the CPU now and then.

    A program takes dozens of memory mappings, of which Linux gives a process 65530: past a thousand of our programs
    the next compilation ends the process.
    """
    yield
    if next(_TESTS_RUN) % 200 == 0 and not has_gpu() and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _keep_together(item)
    reasons = {
        "gpu": None if has_gpu() else "needs an NVIDIA GPU",
        "interpreter": None if is_interpreting() else "needs TRITON_INTERPRET=1 before Python starts",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _keep_together(item: pytest.Item) -> None:
    """One worker for all tests of a case on a GPU: jax-triton remembers what it compiled, but in its process only."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if case is not None and item.get_closest_marker("gpu"):
        item.add_marker(pytest.mark.xdist_group(getattr(case, "name", str(case))))
