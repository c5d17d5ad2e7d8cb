"""The Triton kernels. Each is a plain ``@triton.jit`` function: inputs first, then scalars, outputs last.

Two, `attend_mla_rows` and `attend_mla_columns`, are in Gluon, which the interpreter does not know: plans name them for
Hopper only. Gluon is an experimental part of Triton, so it is imported when a plan asks for it, and nothing else
depends on it.

A launch plan (`kvq_core.plan`) names a kernel and holds all a launch needs but the arrays.
"""

import importlib

from kvq_core.kernels.append import append_kv as append_kv
from kvq_core.kernels.append import claim_slots as claim_slots
from kvq_core.kernels.decode import attend_segments as attend_segments
from kvq_core.kernels.decode import merge_segments as merge_segments
from kvq_core.kernels.gather import copy_pages as copy_pages
from kvq_core.kernels.gather import gather_kv as gather_kv
from kvq_core.kernels.mla import attend_mla_queries as attend_mla_queries
from kvq_core.kernels.mla import attend_mla_segments as attend_mla_segments
from kvq_core.kernels.prefill import attend_queries as attend_queries
from kvq_core.kernels.prefill import finish_queries as finish_queries

_IN_GLUON = ("attend_mla_columns", "attend_mla_rows")


def __getattr__(name: str) -> object:
    if name in _IN_GLUON:
        return getattr(importlib.import_module("kvq_core.kernels.groups"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
