"""What a device function may be passed: Triton 3.6 takes no field of a specification that is not a plain number.

Later versions do, so the compile tests of a CPU machine (Triton 3.7.1) would not notice.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from kvq_core import specs

KERNELS = Path(__file__).parents[1] / "kvq_core" / "kernels"
SPECS = (specs.SideSpec, specs.RecordSpec, specs.AppendSpec, specs.GatherSpec, specs.CopySpec, specs.AttentionSpec)
NUMBERS = {f.name for spec in SPECS for f in dataclasses.fields(spec) if f.type in ("int", "float", "bool")}
FIELDS = {f.name for spec in SPECS for f in dataclasses.fields(spec)}


def test_device_functions_get_fields_of_specifications_only_as_numbers_or_constexprs():
    sources = {path.name: path.read_text() for path in sorted(KERNELS.glob("*.py"))}
    names = set().union(*(device_functions(source) for source in sources.values()))
    assert names >= {"attend_keys", "encode_rows", "store_parts"}
    assert [f"{name}:{call}" for name, source in sources.items() for call in bad_calls(source, names)] == []


def test_a_field_that_is_a_string_is_found():
    source = "@triton.jit\ndef f(x, MODE):\n    return g(x, S.records.caps)\n"
    assert list(bad_calls(source, {"g"})) == ["3 g(S.records.caps)"]


def device_functions(source):
    """Names of the functions of ``source`` that Triton compiles."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def bad_calls(source, names):
    """Calls of ``names`` with a field that is a string or another specification."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            for argument in node.args:
                if isinstance(argument, ast.Attribute) and argument.attr in FIELDS - NUMBERS:
                    yield f"{node.lineno} {node.func.id}({ast.unparse(argument)})"
