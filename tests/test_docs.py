"""The documents name files, commands, options, keys and functions that exist, and their configs are valid."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import nbformat
import pytest

from nncf_mpq_plugin.cli import _parser
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.config_keys import SCHEMA
from nncf_mpq_plugin.joint import JointConfig
from nncf_mpq_plugin.schema import Key

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "nncf_mpq_plugin").rglob("*.py")}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        assert goal.exists(), f"{path.name}: {target}"
        assert ROOT in goal.parents, f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(goal), f"{path.name}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        todo += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert set(PAGES) <= reached


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=page_id)
def test_commands_and_their_options_exist(path: Path) -> None:
    for words in re.findall(r"\bnncf-mpq ([a-z][^`\n]*)", text_of(path)):
        parser = _parser()
        known: set[str] = set()
        for word in words.split():
            if subcommands(parser):
                name = word.strip(".,;:()|")
                assert name in subcommands(parser), f"{path.name}: nncf-mpq {words}"
                parser = subcommands(parser)[name]
                known = {option for action in parser._actions for option in action.option_strings}
            elif word.lstrip("[(").startswith("--"):
                option = word.strip("[]().,;:")
                assert option in known, f"{path.name}: nncf-mpq {words}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_configs_are_valid(path: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        value = json.loads(block)
        if "model" in value and "target_device" not in value:  # that is a config of NNCF 2
            Config.from_json(value, path.name)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_files_and_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\b((?:benchmarks|configs|tests|notebooks|docs)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).exists(), f"{path.name}: {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, f"{path.name}: make {target}"


def key_paths(key: Key, place: str = "") -> list[str]:
    found = []
    for name, inner in key.keys.items():
        here = f"{place}.{name}" if place else name
        found += [here, *key_paths(inner, here)]
    return found


def test_the_migration_names_keys_that_exist() -> None:
    text = (ROOT / "docs" / "migrating-from-hawq.md").read_text(encoding="utf-8")
    table = text[text.index("## Key by key") : text.index("## What differs")]
    paths = key_paths(SCHEMA)
    ours = [row.split(" | ")[1] for row in table.splitlines() if row.startswith("| ") and " | " in row][1:]
    named = {name for cell in ours for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", cell)}
    exempt = {"quantize", "loss", "quantization", "learned_importance"}
    files = {name for name in named if name.endswith((".json", ".html"))}
    for name in named - exempt - files:
        assert any(path == name or path.endswith(f".{name}") for path in paths), name
    assert {"budgets", "deploy.target", "fixed_bits"} <= named


def test_how_it_works_names_code_that_exists() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    names = {path.relative_to(ROOT / "nncf_mpq_plugin").as_posix() for path in SOURCES}
    files = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(files) > 10
    for file in files:
        assert any(name == file or name.endswith(f"/{file}") for name in names), file
    code = "\n".join(SOURCES.values())
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", code, re.MULTILINE))
    keys = {path.rsplit(".", 1)[-1] for path in key_paths(SCHEMA)} | set(key_paths(SCHEMA))
    values = {"scale", "fisher", "loss_change"}
    for name in set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*|[A-Z]\w+\.\w+)`", text)) - values - files:
        last = name.rsplit(".", 1)[-1]
        known = last in defined or any(key == name or key.endswith(f".{name}") for key in key_paths(SCHEMA))
        assert known or name in keys or name.endswith((".json", ".quantize", ".py")), name


def test_every_setting_of_joint_training_has_its_default_and_source() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index("| key | default | source of the default |") :].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    assert all(len(row) == 3 and all(row) for row in rows)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[0])}
    assert named == {field.name for field in dataclasses.fields(JointConfig)} - {"seed"}
    for key, default, _ in rows:
        if re.fullmatch(r"[\d.e-]+", default):
            name = re.findall(r"`([a-z_]+)`", key)[0]
            assert float(default) == getattr(JointConfig(), name), name
