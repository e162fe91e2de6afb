"""
The names of NNCF that the plugin uses: the first tests to look at when a new NNCF breaks something.

The lists are read from the source, so that a name which NNCF no longer has fails here by name, and not as an import
error of everything.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

ADAPTERS = Path(__file__).parent.parent / "nncf_mpq_plugin" / "adapters"
SOURCES = sorted(ADAPTERS.glob("nncf3*.py"))
TREE = ast.parse((ADAPTERS / "nncf3.py").read_text(encoding="utf-8"))

if importlib.metadata.version("nncf").startswith("2."):
    pytest.skip("needs NNCF 3", allow_module_level=True)


def listed(name: str) -> Any:
    """:return: the value of a constant in the adapter's source."""
    for node in TREE.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


PUBLIC, PRIVATE, ATTRIBUTES = listed("PUBLIC_NAMES"), listed("PRIVATE_NAMES"), listed("PRIVATE_ATTRIBUTES")


def find(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", [*PUBLIC, *PRIVATE, *ATTRIBUTES])
def test_nncf_has_the_name(name: str) -> None:
    find(name)


def used() -> set[str]:
    """:return: what the adapter imports from NNCF, and what it reaches by ``nncf.``, with full names."""
    found = set()
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nncf."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted.startswith("nncf."):
                found.add(dotted)
    return found


def test_the_lists_are_complete() -> None:
    known = {*PUBLIC, *PRIVATE, *ATTRIBUTES}
    for name in used():
        assert any(other == name or other.startswith(f"{name}.") for other in known), name


def test_no_name_is_listed_that_is_not_used() -> None:
    """The last part of each name occurs in the code of the adapter or of deploy/, the lists themselves left out."""
    paths = [*SOURCES, ADAPTERS / "base.py", *(ADAPTERS.parent / "deploy").glob("*.py")]
    names = {
        getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    }
    by_text = {"PTConstNoopMetatype"}  # compared with a metatype's __name__
    listed_names = {name.rsplit(".", 1)[-1] for name in (*PUBLIC, *PRIVATE)} | {
        n for a in ATTRIBUTES.values() for n in a
    }
    assert listed_names - by_text <= names


def test_objects_have_the_attributes() -> None:
    """On a traced and quantized model, as the adapter meets them."""
    import nncf
    import torch
    from networks import Residual, prepared
    from nncf.torch.function_hook import get_hook_storage
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, OpMeta
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

    x = torch.zeros(2, 3, 16, 16)
    quantized = nncf.quantize(prepared(Residual), nncf.Dataset([x]), subset_size=1)
    graph = build_nncf_graph(quantized, x)
    edge = graph.get_output_edges(graph.topological_sort()[0])[0]
    hooks = dict(get_hook_storage(quantized).named_hooks())
    mode = FunctionHookMode(quantized, get_hook_storage(quantized))
    quantizer = next(iter(hooks.values()))
    objects = {
        "NNCFGraphEdge": edge,
        "SymmetricQuantizer": quantizer,
        "FunctionHookMode": mode,
        "OpMeta": OpMeta("", torch.relu),
        "ForwardWithHooks": quantized.forward,
    }
    for owner, names in ATTRIBUTES.items():
        for name in names:
            assert hasattr(objects[owner.rsplit(".", 1)[-1]], name), f"{owner}.{name}"
    assert "pre_hooks.block1/conv1/conv2d/0__1.0" in hooks
    assert any(name.startswith("post_hooks.") for name in hooks)
