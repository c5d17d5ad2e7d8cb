"""How the PyTorch launcher runs what Triton has compiled: as Triton does, in fewer steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from kvq_core.plan import LaunchPlan, Output
from kvq_torch import _triton

DRIVER = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda index: ("stream", index))
SPEC = ("a", "specification")
PLAN_FIELDS: dict[str, Any] = {
    "kernel": "kernel",
    "grid": (7, 2, 1),
    "scalars": (5, 3),
    "outputs": (Output((4, 8), "float32"), Output((16,), "uint8", alias=1)),
    "constexprs": (("S", SPEC), ("TILE", 64)),
    "num_warps": 4,
}


class Kernel:
    """Stands in for a kernel that Triton compiles for whatever operands it is launched on, and for `kvq_core.kernels`.

    ``compiled`` has the operands that Triton was asked to find a kernel for; ``launched`` what a compiled one was run
    with.
    """

    def __init__(self) -> None:
        self.kernel = self
        self.compiled: list[tuple] = []
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return functools.partial(self._compile, grid)

    def _compile(self, grid: tuple[int, ...], *operands: Any, **constexprs: Any) -> CompiledKernel:
        self.compiled.append((grid, operands, constexprs))
        kernel = object.__new__(CompiledKernel)
        kernel.module, kernel.function, kernel.packed_metadata = "module", f"function {len(self.compiled)}", (4, 1, 0)
        kernel.src, kernel.name = None, "kernel"
        kernel._run = lambda *args: self.launched.append(args)
        return kernel


@pytest.fixture
def kernel(monkeypatch):
    """A kernel in place of those of kvq, and a driver that Triton and the launcher both ask for the stream."""
    stand_in = Kernel()
    monkeypatch.setattr(_triton, "kernels", stand_in)
    monkeypatch.setattr(driver, "_active", DRIVER)
    return stand_in


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    return torch.zeros(32), torch.zeros(16, dtype=torch.uint8)


def test_a_known_kernel_is_run_as_triton_runs_it(kernel, tensors):
    plan = LaunchPlan(**PLAN_FIELDS)
    _triton.launch(plan, *tensors)
    outputs = _triton.launch(plan, *tensors)
    assert len(kernel.compiled) == len(kernel.launched) == 1
    operands = (*tensors, *plan.scalars, *outputs)
    compiled = _triton._launcher(plan, torch.device("cpu"))._compiled
    compiled[plan.grid](*operands, *dict(plan.constexprs).values(), stream=("stream", None))
    ours, tritons = kernel.launched
    assert ours[:6] == tritons[:6] == (7, 2, 1, ("stream", None), "function 1", (4, 1, 0))
    assert ours[6:9] == (None, None, None)  # what hooks are told, and the hooks: there are none
    assert [hook.calls for hook in tritons[7:9]] == [[], []]
    assert ours[9:] == tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in tritons[9:])
    assert ours[-2:] == (SPEC, 64)


def test_outputs_are_new_buffers_or_the_inputs_they_alias(kernel, tensors):
    plan = LaunchPlan(**PLAN_FIELDS)
    first, second = _triton.launch(plan, *tensors), _triton.launch(plan, *tensors)
    for new, alias in (first, second):
        assert (new.shape, new.dtype, new.is_contiguous()) == ((4, 8), torch.float32, True)
        assert alias is tensors[1]
    assert first[0].data_ptr() != second[0].data_ptr()


def test_operands_at_other_addresses_take_another_kernel_and_leave_the_known_one(kernel, tensors):
    plan = LaunchPlan(**PLAN_FIELDS)
    shifted = torch.zeros(33)[1:], tensors[1]
    for inputs, num_compiled, num_launched in (
        (shifted, 1, 0),
        (tensors, 2, 0),
        (tensors, 2, 1),
        (shifted, 3, 1),
        (tensors, 3, 2),
    ):
        _triton.launch(plan, *inputs)
        assert (len(kernel.compiled), len(kernel.launched)) == (num_compiled, num_launched)
    assert {args[4] for args in kernel.launched} == {"function 2"}


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_that_listens_to_launches_hears_of_them(kernel, tensors, name):
    plan = LaunchPlan(**PLAN_FIELDS)
    _triton.launch(plan, *tensors)
    hooks = getattr(knobs.runtime, name)
    hooks.add(print)
    try:
        _triton.launch(plan, *tensors)
    finally:
        hooks.remove(print)
    assert (len(kernel.compiled), len(kernel.launched)) == (2, 0)


def test_plans_and_devices_have_kernels_of_their_own():
    plans = LaunchPlan(**PLAN_FIELDS), LaunchPlan(**PLAN_FIELDS)
    devices = [torch.device("cuda", index) for index in range(2)]
    launchers = {_triton._launcher(plan, device) for plan in plans for device in devices}
    assert len(launchers) == 4
    assert _triton._launcher(plans[0], torch.device("cuda", 1)) in launchers


@pytest.mark.parametrize("launch_pdl", [False, True])
def test_a_kernel_is_compiled_with_what_its_plan_says(kernel, tensors, launch_pdl):
    plan = LaunchPlan(**PLAN_FIELDS, launch_pdl=launch_pdl)
    outputs = _triton.launch(plan, *tensors)
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    options |= {"launch_pdl": True} if launch_pdl else {}
    ((grid, operands, keywords),) = kernel.compiled
    assert (grid, keywords) == (plan.grid, dict(plan.constexprs) | options)
    assert all(got is want for got, want in zip(operands, (*tensors, 5, 3, *outputs), strict=True))
