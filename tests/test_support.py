"""The table of what is supported where: it is in the README, it has no holes, and its cells follow from the cases."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import Phase, find, settings
from hypothesis import strategies as st

from kvq_core.plan import LibraryPlan
from tests import backends, library_support, support, test_library_prefill, test_properties
from tests.support import COLUMNS
from tests.variants import MLA_VARIANTS, VARIANTS

RANDOM_CASES = st.one_of(
    test_properties.append_cases(), test_properties.gather_cases(), test_properties.attention_cases()
)
RANDOM_MLA_CASES = test_properties.mla_attention_cases()
DRAWN = [(variant, RANDOM_CASES) for variant in VARIANTS if variant.drawn]
DRAWN += [(variant, RANDOM_MLA_CASES) for variant in MLA_VARIANTS if variant.drawn]


def name_of(variant):
    return f"mla-{variant.name}" if variant in MLA_VARIANTS else variant.name


def test_the_readme_holds_the_tables_that_the_cases_give():
    readme = support.README.read_text()
    assert support.tables() in readme, "run `python -m tests.support --write`"
    assert support.with_tables(readme) == readme, "run `python -m tests.support --write`"


def test_every_backend_is_in_one_column():
    names = [name for column in COLUMNS for name in column.names]
    assert sorted(names) == sorted(backend.name for backend in backends.ALL)


@pytest.mark.parametrize("variant", [*VARIANTS, *MLA_VARIANTS], ids=name_of)
def test_every_variant_is_covered_on_every_backend_that_has_it(variant):
    covered = {column for column in COLUMNS if support.covered(variant, column)}
    assert covered == {column for column in COLUMNS if column.framework not in variant.not_in}


def test_every_case_is_one_of_some_variant():
    conditions = [covers for variant in (*VARIANTS, *MLA_VARIANTS) for covers in variant.conditions]
    assert [case.name for case in support.CASES if not any(covers(case) for covers in conditions)] == []


@pytest.mark.parametrize(("variant", "random_cases"), DRAWN, ids=[name_of(variant) for variant, _ in DRAWN])
def test_hypothesis_draws_every_variant_that_the_readme_says_it_draws(variant, random_cases):
    enough = settings(max_examples=1000, phases=[Phase.generate])
    for covers in variant.conditions:
        assert covers(find(random_cases, covers, settings=enough))


def test_a_cell_without_cases_claims_nothing():
    nothing = dataclasses.replace(VARIANTS[0], covers=lambda case: False)
    assert support.covered(nothing, *COLUMNS) == set()
    assert support.text_of(set()) == "-"


def test_a_cell_that_lacks_a_mode_names_those_it_has():
    seen = support.Column("jax", "triton", "interpreter", ("jax-interpreter",))
    variant = next(variant for variant in VARIANTS if variant.name.startswith("`merge_states`"))
    assert support.cells(variant)[0] == "int8, e4m3, bf16"
    assert support.cells(variant)[1 + COLUMNS.index(seen)] == "int8"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"int8_per_token_head", "bfloat16"}, "int8, bf16"),
        (set(support.SHORT_NAMES), "all"),
        ({*support.SHORT_NAMES, "bfloat16/int8_per_token_head"}, "all, 1 pair"),
        ({"fp8_e5m2", "bfloat16/int8_per_token_head", "float16/fp8_e4m3"}, "e5m2, 2 pairs"),
        ({64}, "64"),
        ({1, 128, 5}, "1 to 128 (3)"),
    ],
)
def test_cells_read_as_modes_or_as_ranges(values, text):
    assert support.text_of(values) == text


@pytest.mark.parametrize("variant", library_support.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_of_library_prefill_is_covered_wherever_there_is_one(variant):
    covered = {impl.framework for impl in library_support.IMPLEMENTATIONS if variant.covered(impl.cases)}
    assert covered == {"torch", "jax"} - set(variant.not_in)


def test_the_plan_takes_every_case_that_library_prefill_is_said_to_be_tested_with():
    plans = {case.name: library_support.plan_of(case, length) for case, length in test_library_prefill.CASES}
    assert {name: plan for name, plan in plans.items() if not isinstance(plan, LibraryPlan)} == {}


def test_the_readme_names_every_need_of_library_prefill_that_is_refused_in_a_test():
    needs = library_support.needs()
    for _, message in test_library_prefill.REFUSED.values():
        assert any(message in need for need in needs), message


def test_library_prefill_claims_no_variant_and_no_mode_without_cases():
    nothing = library_support.Implementation("torch", "sdpa", ())
    assert library_support.variants(nothing) == []
    assert library_support.modes(nothing) == set()
