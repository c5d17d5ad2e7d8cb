"""The edges along which code may import: format -> layout -> plan -> kernel -> op -> module (DESIGN.md section 2)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kvq_core", "kvq_torch", "kvq_jax")

# A name may import itself and what stands above it; a package stands for all its files that are not named.
LAYERS = (
    ("kvq_core.modes", "kvq_core.codec"),
    ("kvq_core.layout",),
    ("kvq_core.mla",),
    ("kvq_core.model_defaults", "kvq_core.model_config", "kvq_core.policy", "kvq_core.planner"),
    ("kvq_core.advice", "kvq_core.__main__"),
    ("kvq_core.specs", "kvq_core.arguments", "kvq_core.mla_arguments", "kvq_core.scales", "kvq_core.plan"),
    ("kvq_core.kernels",),
    ("kvq_torch", "kvq_jax"),
    ("kvq_torch.nn", "kvq_torch.transformers", "kvq_jax.flax"),
)
# Beside the layers. The numpy reference is for users and tests: whatever is optimised must not lean on it.
REFERENCE = "kvq_core.reference"
BESIDE = {
    "kvq_core": (
        *LAYERS[0],
        *LAYERS[1],
        *LAYERS[2],
        *LAYERS[3],
        REFERENCE,
        "kvq_core.checks",
        "kvq_core.checkpoint",
        "kvq_core.scales",
    ),
    "kvq_core.checks": (),
    "kvq_core.checkpoint": (),
    REFERENCE: (*LAYERS[0], *LAYERS[1], *LAYERS[2], "kvq_core.arguments", "kvq_core.mla_arguments"),
}

CORE_LIBRARIES = {"numpy", "ml_dtypes"}
FORBIDDEN = {
    "kvq_core.kernels": {"torch", "jax", "jax_triton", "flax"},
    "kvq_core": {"torch", "jax", "jax_triton", "flax", "triton"},
    "kvq_torch": {"jax", "jaxlib", "jax_triton", "flax", "kvq_jax"},
    "kvq_jax": {"torch", "kvq_torch"},
}


def violations(root):
    """A line for every import below ``root`` that the rules do not allow."""
    files = {module_name(path, root): path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))}
    for module, path in files.items():
        tree = ast.parse(path.read_text())
        top_level = set(imported_names(top_level_statements(tree), files))
        for name in sorted(set(imported_names(ast.walk(tree), files))):
            reason = library_violation(module, name, name in top_level) or edge_violation(module, name)
            if reason:
                yield f"{module} imports {name}: {reason}"


def library_violation(module, name, is_top_level):
    package = next(package for package in FORBIDDEN if is_inside(module, package))
    library = name.split(".")[0]
    if library in FORBIDDEN[package]:
        return f"{package} never imports {library}"
    is_core = package.startswith("kvq_core")
    allowed = {*sys.stdlib_module_names, *CORE_LIBRARIES, *PACKAGES, *({"triton"} if package != "kvq_core" else ())}
    if is_core and is_top_level and library not in allowed:
        return f"{package} needs only {sorted(CORE_LIBRARIES)}; import others where they are used"
    return None


def edge_violation(module, name):
    if name.split(".")[0] not in PACKAGES or name == module:
        return None
    if module in BESIDE:
        return None if name in BESIDE[module] else f"{module} stands beside the layers"
    if name == REFERENCE:
        return "the reference is the specification, not a library"
    source, target = layer(module), layer(name)
    if source is None:
        return f"{module} has no layer"
    if name in BESIDE:
        return None if source >= layer("kvq_torch") else "the package and its checks are for callers"
    if target is None:
        return f"{name} has no layer"
    return "imports never turn back" if target > source else None


def layer(name):
    """The number of the layer of the longest listed prefix of ``name``."""
    matches = [
        (len(entry), number) for number, entries in enumerate(LAYERS) for entry in entries if is_inside(name, entry)
    ]
    return max(matches)[1] if matches else None


def is_inside(name, package):
    return name == package or name.startswith(f"{package}.")


def module_name(path, root):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def top_level_statements(tree):
    """What runs on import: everything outside of functions."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def imported_names(nodes, files):
    """Dotted names that the nodes import; ``from package import x`` is ``package.x`` where that is a file of ours."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield submodule if submodule in files else module
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) else "a name that is computed"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == REFERENCE:
            yield REFERENCE


def called_name(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def test_imports_follow_the_data():
    assert not list(violations(ROOT))


def test_every_package_is_looked_at():
    assert all(list((ROOT / package).rglob("*.py")) for package in PACKAGES)


GOOD_TREE = {
    "kvq_core/__init__.py": "from kvq_core import checks, reference\nfrom kvq_core.layout import CacheLayout",
    "kvq_core/modes.py": "import enum\nimport numpy as np\nimport ml_dtypes",
    "kvq_core/layout.py": "from kvq_core.modes import KVQuantMode",
    "kvq_core/plan.py": "from kvq_core.layout import CacheLayout\ndef save():\n    import safetensors",
    "kvq_core/kernels/append.py": "import triton.language as tl\nfrom kvq_core.kernels import codec",
    "kvq_core/kernels/codec.py": "import triton",
    "kvq_core/reference.py": "from kvq_core.layout import CacheLayout",
    "kvq_core/checks.py": "import numpy as np",
    "kvq_torch/ops.py": "import torch\nfrom kvq_core import CacheLayout, kernels\nfrom kvq_core.plan import plan",
    "kvq_jax/flax.py": "import flax\nfrom kvq_jax.ops import append_kv",
    "kvq_jax/ops.py": "import jax\nimport importlib\nimportlib.import_module('jax_triton')",
}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kvq_core/modes.py", "from kvq_core.layout import CacheLayout"),
        ("kvq_core/modes.py", "from kvq_core import CacheLayout"),
        ("kvq_core/modes.py", "from .modes import KVQuantMode"),
        ("kvq_core/layout.py", "import torch"),
        ("kvq_core/layout.py", "import triton"),
        ("kvq_core/layout.py", "import safetensors"),
        ("kvq_core/layout.py", "if True:\n    import scipy"),
        ("kvq_core/layout.py", "def lazily():\n    import jax"),
        ("kvq_core/layout.py", "__import__('to' + 'rch')"),
        ("kvq_core/plan.py", "from kvq_core import kernels"),
        ("kvq_core/plan.py", "def lazily():\n    from kvq_core.kernels.append import append"),
        ("kvq_core/plan.py", "from kvq_core import reference"),
        ("kvq_core/plan.py", "import kvq_torch"),
        ("kvq_core/unplaced.py", "import kvq_core.modes"),
        ("kvq_core/kernels/append.py", "import torch"),
        ("kvq_core/kernels/append.py", "from kvq_torch import ops"),
        ("kvq_core/kernels/append.py", "from kvq_core.reference import append_kv"),
        ("kvq_core/reference.py", "from kvq_core.plan import plan"),
        ("kvq_core/checks.py", "from kvq_core.reference import append_kv"),
        ("kvq_torch/ops.py", "import jax.numpy as jnp"),
        ("kvq_torch/ops.py", "from kvq_jax import ops"),
        ("kvq_torch/ops.py", "from kvq_core.reference import append_kv"),
        ("kvq_torch/ops.py", "import kvq_core\nkvq_core.reference.append_kv"),
        ("kvq_jax/ops.py", "import torch.utils"),
        ("kvq_jax/ops.py", "import importlib\nimportlib.import_module('torch')"),
        ("kvq_jax/ops.py", "def lazily():\n    from kvq_core import reference"),
        ("kvq_jax/ops.py", "from kvq_jax import flax"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, path, line):
    write_tree(tmp_path, GOOD_TREE)
    assert not list(violations(tmp_path))
    write_tree(tmp_path, {path: f"{GOOD_TREE.get(path, '')}\n{line}"})
    found = list(violations(tmp_path))
    assert len(found) == 1
    assert found[0].startswith(path.removesuffix(".py").replace("/", "."))


def write_tree(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_kvq_core_needs_neither_torch_nor_jax_nor_triton():
    script = """
import sys
for name in ("torch", "jax", "jaxlib", "jax_triton", "flax", "triton"):
    sys.modules[name] = None  # importing it now raises ImportError
import kvq_core
assert kvq_core.reference.append_kv and kvq_core.checks.check_slot_mapping
layout = kvq_core.CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)
assert set(kvq_core.__all__) <= set(dir(kvq_core)) and kvq_core.__version__
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True)


def test_only_the_kernels_in_gluon_need_gluon():
    """It is an experimental part of Triton, which may change under every other kernel."""
    script = """
import sys
sys.modules["triton.experimental.gluon"] = None  # importing it now raises ImportError
from kvq_core import kernels
kernels.attend_mla_segments
for name in ("attend_mla_rows", "attend_mla_columns"):
    try:
        getattr(kernels, name)
    except ImportError:
        continue
    sys.exit(f"{name} did not need Gluon")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True)
