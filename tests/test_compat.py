"""The table of what the package touches inside other libraries is complete, and these libraries still have it."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import dllm_trl
from dllm_trl._compat import TOUCHED


PACKAGE = Path(dllm_trl.__file__).parent
LIBRARIES = {"trl", "transformers", "peft", "accelerate", "torch"}
NAMES = {owner: [entry.partition("(")[0] for entry in entries] for owner, entries in TOUCHED.items()}
LISTED = {name for names in NAMES.values() for name in names}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def of_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] in LIBRARIES


@functools.cache
def own_names(cls: type) -> set[str]:
    """What a class defines, or keeps in an instance."""
    names = set(vars(cls)) | set(vars(cls).get("__annotations__", ()))
    return names | set(re.findall(r"\bself\.(\w+)\b[^=\n()]*=[^=]", inspect.getsource(cls)))


def has(owner, name: str) -> bool:
    if hasattr(owner, name):
        return True
    if inspect.ismodule(owner):  # an attribute that its functions give to others
        return f".{name}" in inspect.getsource(owner)
    return isinstance(owner, type) and any(name in own_names(cls) for cls in owner.__mro__ if of_library(cls))


@pytest.mark.parametrize("path", TOUCHED)
def test_the_libraries_have_what_we_touch(path):
    """A version that lacks something, or changes the arguments of a method, needs a look at where it is used."""
    owner = pkgutil.resolve_name(path)
    for entry in TOUCHED[path]:
        name, _, arguments = entry.partition("(")
        assert has(owner, name), f"{path} has no {name}"
        if arguments:
            given = [argument for argument in inspect.signature(getattr(owner, name)).parameters if argument != "self"]
            assert ", ".join(given) == arguments.rstrip(")"), f"{path}.{name}"


# ------------------------------------------------------------------------------------------------------------ the scan


def imported(tree: ast.AST) -> set[tuple[str, str]]:
    """`(module, name)` of each import from the inside of a library: of what its top level does not export, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            top = importlib.import_module(node.module.split(".")[0])
            for name in (alias.name for alias in node.names):
                # `torch` and `accelerate` document their modules; of the others only the top level is promised
                inside = top.__name__ in ("trl", "transformers", "peft") and "." in node.module
                if any(map(is_private, [*node.module.split("."), name])) or inside and not hasattr(top, name):
                    found.add((node.module, name))
    return found


def reached(tree: ast.AST) -> set[tuple[str, str]]:
    """`(receiver, name)` of each private attribute, `getattr(x, "_name")` included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                found.add((ast.unparse(node.args[0]), name.value))
    return {(receiver, name) for receiver, name in found if receiver not in sys.stdlib_module_names}


def defined(tree: ast.AST) -> set[str]:
    """Private names that a piece of code makes: functions, and what it binds or stores in `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return set(filter(is_private, names))


def missing_of_class(cls: type, body: ast.ClassDef, users: list[type]) -> set[str]:
    """Private names of a library that the body of `cls` uses on itself, for any of the classes it is mixed into."""
    used = {name for receiver, name in reached(body) if receiver in ("self", "cls", "super()")} | defined(body)
    missing = set()
    for user in users:
        bases = [base for base in user.__mro__ if of_library(base)]
        listed = {name for path, names in NAMES.items() if pkgutil.resolve_name(path) in bases for name in names}
        missing |= {name for name in used - listed if any(name in own_names(base) for base in bases)}
    return missing


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())


def test_the_table_is_complete():
    trees = dict(sources())
    ours = set().union(*map(defined, trees.values()))
    classes = {
        value: body
        for module, tree in trees.items()
        for body in tree.body
        if isinstance(body, ast.ClassDef)
        and isinstance(value := getattr(importlib.import_module(module), body.name), type)
    }
    missing = {f"{owner}: {name}" for tree in trees.values() for owner, name in imported(tree)}
    missing -= {f"{owner}: {name}" for owner, names in NAMES.items() for name in names}
    for module, tree in trees.items():
        missing |= {f"{module}: {receiver}.{name}" for receiver, name in reached(tree) if name not in ours | LISTED}
    for cls, body in classes.items():
        names = missing_of_class(cls, body, [user for user in classes if cls in user.__mro__])
        missing |= {f"{cls.__module__}: {cls.__name__}.{name}" for name in names}
    assert not missing, "\n".join(sorted(missing))


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("from trl.trainer.utils import pad", {("trl.trainer.utils", "pad")}),
        ("from trl import GRPOTrainer, GRPOConfig", set()),
        ("from transformers.models.qwen3.modeling_qwen3 import Qwen3Model", set()),
        ("from torch._dynamo import config", {("torch._dynamo", "config")}),
        ("from torch.nn import functional", set()),
        ("super()._save(x)", {("super()", "_save")}),
        ("self.model._hidden", {("self.model", "_hidden")}),
        ("getattr(x, '_hidden', None)", {("x", "_hidden")}),
        ("os._exit(0)", set()),
        ("self.__dict__", set()),
    ],
)
def test_the_scan_sees(source, seen):
    tree = ast.parse(source)
    assert imported(tree) | reached(tree) == seen


def test_the_scan_sees_what_a_class_overrides():
    from dllm_trl.trainers import DiffusionGRPOTrainer as Trainer

    source = "class A:\n    def _wrap_model(self, x): pass\n    def f(self): return self._prepare_input"
    missing = missing_of_class(Trainer, ast.parse(source).body[0], [Trainer])
    assert missing == {"_wrap_model", "_prepare_input"}
