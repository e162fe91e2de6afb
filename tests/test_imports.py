"""The rules of how the package's modules may depend on each other, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nncf_mpq_plugin

PACKAGE = Path(nncf_mpq_plugin.__file__).parent
NAME = "nncf_mpq_plugin"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}
ONLY_UNDER = {
    "nncf": ("adapters.",),
    "mip": ("allocation.program",),
    "openvino": ("deploy.",),
    "onnx": ("deploy.",),
    "onnxruntime": ("deploy.",),
    "rich": ("cli", "tables"),
}
# what a module of the core may import of the package, itself and what these import included
LAYERS = (
    ("errors", "progress", "batch_norm"),
    ("files", "requirements", "distributed", "memory"),
    ("types",),
    ("schema", "config_keys", "config", "costs", "outliers", "quantizer", "lsq", "recompute", "stem"),
    ("allocation.bounds", "allocation.constraints", "allocation.states"),
    ("allocation.join",),
    ("allocation.enumeration",),
    ("allocation.program",),
    ("allocation.search",),
    ("allocation.explain", "allocation.sweep"),
    ("allocation", "comparison"),
    ("stability", "placement", "checkpoint", "batches", "models", "summary", "tables"),
    ("training", "data"),
    ("loop", "importance"),
    ("preflight",),
    ("joint", "finetune", "floating", "runfolder", "sensitivity", "refine"),
    ("search_options",),
)
TOP = ("pipeline", "api", "cli")


def imports(path: Path) -> set[str]:
    """:return: every module that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == NAME else {module}
    return found


def own(path: Path) -> set[str]:
    """:return: the package's modules that a source file imports, without the package's name."""
    return {name.removeprefix(f"{NAME}.") for name in imports(path) if name.startswith(f"{NAME}.")}


def reachable(module: str) -> set[str]:
    """:return: ``module`` and every module of the package that it needs."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [other for other in own(MODULES[name]) if other in MODULES] if name in MODULES else []
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_belong_only(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    for package, places in ONLY_UNDER.items():
        if package in roots:
            assert any(module == place or module.startswith(place) for place in places), f"{module} imports {package}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_needs_itself(module: str) -> None:
    for other in own(MODULES[module]):
        assert module not in reachable(other), f"{module} imports {other}, which needs {module}"


@pytest.mark.parametrize("module", [name for layer in LAYERS for name in layer if name in MODULES])
def test_the_core_needs_neither_adapters_nor_deployment_nor_the_pipeline(module: str) -> None:
    for other in reachable(module):
        assert other not in TOP, f"{module} needs {other}"
        assert not other.startswith(("adapters", "deploy", "report")), f"{module} needs {other}"


@pytest.mark.parametrize(
    ("lower", "upper"), [(low, high) for low in range(len(LAYERS)) for high in range(low + 1, len(LAYERS))]
)
def test_imports_point_from_later_layers_to_earlier_ones(lower: int, upper: int) -> None:
    for module in LAYERS[lower]:
        if module in MODULES:
            assert not own(MODULES[module]) & set(LAYERS[upper]), module


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("cli",)])
def test_only_the_command_prints_and_exits(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit", "quit", "os._exit"), f"{module}, line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_pickled(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.save", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"), module
            if called == "torch.load":
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("weights_only") == "True", module


def test_importing_the_package_loads_no_framework() -> None:
    code = f"import sys, {NAME}; print([n for n in ('torch', 'nncf', 'openvino', 'mip', 'numpy') if n in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_searching_a_table_loads_neither_torch_nor_nncf() -> None:
    code = f"import sys, {NAME}.cli, {NAME}.allocation, {NAME}.summary, {NAME}.config; print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


@pytest.mark.parametrize("name", nncf_mpq_plugin.__all__)
def test_every_public_name_is_what_it_says(name: str) -> None:
    value = getattr(nncf_mpq_plugin, name)
    assert callable(value)
    assert value.__doc__
    assert nncf_mpq_plugin._ORIGINAL.get(name, name) == value.__name__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = nncf_mpq_plugin.quantise
