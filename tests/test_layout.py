"""Imports flow one way: types <- generation <- modeling <- scoring <- trainers, evaluation <- cli, recipes."""

import ast
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "dllm_trl"
# What each room may import of ours, besides itself.
BASE = {"types", "_compat"}
ALLOWED = {
    "types": set(),
    "_compat": set(),
    "generation": BASE,
    "modeling": BASE | {"generation"},
    "rewards": set(),
    "objectives": {"types"},
    "scoring": BASE | {"generation", "modeling"},
    "hub": BASE | {"generation", "modeling"},
    "evaluation": BASE | {"generation", "modeling", "scoring", "rewards"},
    "trainers": BASE | {"generation", "modeling", "scoring", "objectives", "rewards", "hub"},
    "cli": BASE | {"generation", "modeling", "scoring", "objectives", "rewards", "hub", "evaluation", "trainers", ""},
    "": {"modeling", "trainers"},  # the package itself, which registers the families and exports names
}


def room(module: str) -> str:
    """`dllm_trl.objectives.trace` -> `objectives`, `dllm_trl.types` -> `types`."""
    return "".join(module.split(".")[1:2])


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of all modules that a module's source imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from dllm_trl import modeling` imports a room, `from dllm_trl import TraceRLConfig` the package.
            rooms = {alias.name for alias in node.names if start == "dllm_trl" and alias.name in ALLOWED}
            names |= {f"dllm_trl.{name}" for name in rooms}
            if len(rooms) < len(node.names):
                names.add(start)
    return names


def violations(source: str, module: str, is_package: bool) -> set[str]:
    own = room(module)
    names = imported(source, module, is_package)
    found = {name for name in names if name.split(".")[0] == "dllm_trl" and room(name) not in ALLOWED[own] | {own}}
    if own == "objectives":  # tensors only
        found |= {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", "dllm_trl"}}
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield pytest.param(path, ".".join(parts[:-1] if is_package else parts), is_package, id="/".join(parts))


@pytest.mark.parametrize(("path", "module", "is_package"), list(modules()))
def test_imports_flow_downwards(path, module, is_package):
    assert room(module) in ALLOWED, f"{module} is in no known room"
    assert not violations(path.read_text(), module, is_package)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("dllm_trl.types", "import dllm_trl.generation", {"dllm_trl.generation"}),
        ("dllm_trl.generation.mixin", "def f():\n    from ..modeling.base import x", {"dllm_trl.modeling.base"}),
        ("dllm_trl.generation.mixin", "from .engine import x\nfrom ..types import y", set()),
        ("dllm_trl.modeling.base", "from dllm_trl import trainers", {"dllm_trl.trainers"}),
        ("dllm_trl.modeling.base", "from dllm_trl import DiffusionGenerationConfig", {"dllm_trl"}),
        ("dllm_trl.rewards.math", "from dllm_trl.types import Round", {"dllm_trl.types"}),
        ("dllm_trl.objectives.trace", "import torch, trl\nfrom dllm_trl.types import Round", {"trl"}),
        ("dllm_trl.cli", "from dllm_trl import TraceRLConfig\nfrom dllm_trl.trainers import x", set()),
    ],
)
def test_this_test_sees_violations(module, source, expected):
    assert violations(source, module, is_package=False) == expected
