"""Launch plans: what to launch for given shapes on a given device, decided in one place for both frameworks.

Pure functions without a framework; equal arguments give equal plans. The launchers (`kvq_torch._triton`,
`kvq_jax._triton`, `kvq_core.kernels.interpret`) execute a plan and decide nothing.
"""

from kvq_core.plan.attention import AttentionPlan as AttentionPlan
from kvq_core.plan.attention import plan_paged_attention as plan_paged_attention
from kvq_core.plan.cache import AppendPlan as AppendPlan
from kvq_core.plan.cache import plan_append_kv as plan_append_kv
from kvq_core.plan.cache import plan_copy_pages as plan_copy_pages
from kvq_core.plan.cache import plan_gather_kv as plan_gather_kv
from kvq_core.plan.launch import DeviceFacts as DeviceFacts
from kvq_core.plan.launch import LaunchPlan as LaunchPlan
from kvq_core.plan.launch import Output as Output
from kvq_core.plan.library import LibraryPlan as LibraryPlan
from kvq_core.plan.library import library_is_faster as library_is_faster
from kvq_core.plan.library import plan_library_attention as plan_library_attention
from kvq_core.plan.mla import plan_mla_attention as plan_mla_attention
