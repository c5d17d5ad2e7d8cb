"""The Triton kernels. Each is a plain ``@triton.jit`` function: inputs first, then scalars, outputs last.

One, `attend_mla_groups`, is in Gluon, which the interpreter does not know: plans name it for Hopper only.

A launch plan (`kvq_core.plan`) names a kernel and holds all a launch needs but the arrays.
"""

from kvq_core.kernels.append import append_kv as append_kv
from kvq_core.kernels.append import claim_slots as claim_slots
from kvq_core.kernels.decode import attend_segments as attend_segments
from kvq_core.kernels.decode import merge_segments as merge_segments
from kvq_core.kernels.gather import copy_pages as copy_pages
from kvq_core.kernels.gather import gather_kv as gather_kv
from kvq_core.kernels.groups import attend_mla_groups as attend_mla_groups
from kvq_core.kernels.mla import attend_mla_queries as attend_mla_queries
from kvq_core.kernels.mla import attend_mla_segments as attend_mla_segments
from kvq_core.kernels.prefill import attend_queries as attend_queries
from kvq_core.kernels.prefill import finish_queries as finish_queries
