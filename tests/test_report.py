"""The report's page: everything of the run is on it, and nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from runs import tiny

from nncf_mpq_plugin.allocation import search
from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.comparison import uniform
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.costs import limits_of
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.report import write_report
from nncf_mpq_plugin.report.contents import Contents
from nncf_mpq_plugin.report.page import render
from nncf_mpq_plugin.report.svg import ROLES
from nncf_mpq_plugin.report.tradeoff import curves
from nncf_mpq_plugin.runfolder import RunFolder
from nncf_mpq_plugin.summary import summarize
from nncf_mpq_plugin.types import (
    FixedLayer,
    ImportanceTable,
    LayerBits,
    LayerCost,
    LayerImportance,
    Policy,
    read_json,
    write_json,
)

ODD_NAME = "blocks.<b>2</b>.$x_1$&"  # markup, and what matplotlib would read as a formula
NAMES = ("blocks.0.conv", "blocks.1.conv", ODD_NAME)
STEM = FixedLayer(LayerCost("stem", 1000, 100, "stem"), LayerBits(8, 8))


def table() -> ImportanceTable:
    layers = tuple(
        LayerImportance(
            LayerCost(name, 3000 - 700 * index, 200 * (index + 1), name),
            {2: 0.5 + 0.2 * index, 4: 0.1 / (index + 1), 8: 0.0},
            {2: 0.3, 4: 0.04 * (index + 1), 8: 0.15 if index == 1 else 0.0},
        )
        for index, name in enumerate(NAMES)
    )
    return ImportanceTable((2, 4, 8), layers, (STEM,), unit="loss", model="small", source="made up")


def agreement(name: str, *failures: str, required: bool = True) -> dict[str, Any]:
    from nncf_mpq_plugin.deploy.verification import Agreement

    return {**vars(Agreement(name, 0.98, 0.001, 0.1, 1.0, 1.0, required, failures)), "failures": list(failures)}


def benchmark() -> dict[str, Any]:
    from nncf_mpq_plugin.deploy.footprint import Footprint
    from nncf_mpq_plugin.deploy.measurement import BenchmarkReport, Latency, ModelFigures

    time = Latency(1.25, 1.0, 1.5, 100, (1.25,))
    models = [
        ModelFigures(
            name,
            2000,
            1000,
            Latency(1.25 * factor, factor, 1.5 * factor, 100, (1.25 * factor,)),
            time,
            Footprint(0.1, 10**7, 10**7),
            0.5,
            {},
        )
        for name, factor in (("FP32", 2.0), ("INT8", 1.0), ("mixed", 1.1))
    ]
    models.append(ModelFigures("mixed (ORT)", 2000, 1000, time, None, None, None, {}))
    return BenchmarkReport("Some CPU", ("INT8",), 2, (1, 3, 8, 8), {}, tuple(models), {}).to_json()


def write_run(path: Path, *, complete: bool = True, failures: tuple[str, ...] = ()) -> Path:
    """:return: the folder of a run that left what a run leaves, or the policy alone."""
    folder = RunFolder.create(path, Config.from_json(tiny()))
    solution = search(table(), folder.config.budget)
    table().save(folder.file("importance.json"))
    solution.policy.save(folder.file("policy.json"))
    if not complete:
        return path
    even = uniform(table(), folder.config.budget)
    even.save(folder.file("uniform_policy.json"))
    names = ("stem", *NAMES)
    scales = {f"{name}.{part}": {"8": [1.0, 0.9]} for part in ("weight", "activation") for name in names}
    joint = {"steps": [0, 5, 10], "losses": {name: [2.0, 1.0] for name in ("8", "4", "2", "random")}, "scales": scales}
    write_json(folder.file("joint/history.json"), {"history": joint, "steps": 10, "seconds": 1.0})
    for name in ("model", "uniform"):
        losses = {"steps": [0, 5, 10], "losses": {"policy": [0.9, 0.8]}, "scales": {}}
        write_json(folder.file(f"{name}/history.json"), losses)
    runtimes = [agreement("OpenVINO IR", *failures), agreement("ONNX Runtime")]
    verification = {"ok": not failures, "samples": 64, "torch_float64": agreement("torch float64", required=False)}
    write_json(folder.file("verify.json"), {"schema_version": 1, **verification, "runtimes": runtimes})
    write_json(folder.file("benchmark.json"), benchmark())
    metrics = {
        name: {"accuracy": accuracy, "loss": 0.25, "samples": 500}
        for name, accuracy in (("float", 0.9712), ("int8", 0.9705), ("mixed", 0.9634), ("uniform", 0.9456))
    }
    limits = limits_of(table(), folder.config.budget)
    summary = summarize(table(), solution.policy, even, metrics, read_json(folder.file("verify.json")), limits)
    write_json(folder.file("summary.json"), summary)
    return path


@dataclass
class Reader(HTMLParser):
    """:param words: visible text. :param attributes: (tag, name, value) of every attribute."""

    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def drawings(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "small_run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_says_what_the_run_came_to(page: str) -> None:
    words = read(page).words
    for text in (
        "small_run",
        "97.12%",
        "97.05%",
        "96.34%",
        "94.56%",
        "FP32",
        "INT8",
        "uniform",
        "mixed",
        "average_bits",
    ):
        assert text in words, text
    for text in ("Some CPU", "1.375", "OpenVINO IR", "agree with the trained model", "Joint training", "Fine-tuning"):
        assert any(text in word for word in words), text
    shown = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert shown is not None
    config = json.loads("".join(read(shown[0]).words))
    assert config == Config.from_json(tiny()).to_json()
    assert version("nncf") in words


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", page)
    policy = [value for tag, name, value in reader.attributes if tag == "meta" and name == "content"]
    assert "default-src 'none'; style-src 'unsafe-inline'" in policy


def test_ids_are_unique_and_references_find_them(page: str) -> None:
    ids = [value for _, name, value in read(page).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert {value[1:] for _, name, value in read(page).attributes if name.endswith("href")} <= set(ids)


def test_every_colour_of_a_drawing_is_a_variable_with_a_light_and_a_dark_value(page: str) -> None:
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\((--[a-z]+)\)", page)) - {"--width", "--height"}
    assert {f"--{role}" for role in ROLES} | {"--early", "--late"} <= used
    for name in used:
        assert f"{name}: #" in light, name
        assert f"{name}: #" in dark, name
    for drawing in drawings(page):
        for element in drawing.iter():
            text = " ".join(element.attrib.values())
            assert not re.search(r"#[0-9a-f]{6}\b", text), text
            assert "font-family" not in text


def test_text_stays_text_with_every_layer_in_the_network_s_order(page: str) -> None:
    layers = next(svg for svg in drawings(page) if "share of BitOps" in svg.get("aria-label", ""))
    texts = [element.text for element in layers.iter() if element.tag.endswith("}text")]
    assert [text for text in texts if text in ("stem", *NAMES)] == ["stem", *NAMES]
    titles = [element.text for element in layers.iter() if element.tag.endswith("}title")]
    policy = search(table(), Config.from_json(tiny()).budget).policy
    assert f"{ODD_NAME}: {policy.layers[ODD_NAME].weight}-bit weights" in titles
    assert "stem: 8-bit activations, fixed" in titles


def test_what_the_run_named_is_not_markup(page: str) -> None:
    assert "<b>2</b>" not in page
    assert ODD_NAME in read(page).words


def test_an_importance_out_of_order_is_listed(page: str) -> None:
    assert "Out of order (more bits, larger importance): 1" in read(page).words


def test_the_chosen_policy_lies_on_the_curve(run: Path) -> None:
    contents = Contents.load(run)
    (curve,) = curves(contents)
    mixed, even = curve.policies["mixed"], curve.policies["uniform"]
    assert mixed.objective == pytest.approx(contents.policy.summary["objective"])
    assert mixed.value == pytest.approx(contents.policy.summary["bitops"] / (64 * 6900))
    assert even.value == pytest.approx(0.25)
    for point in curve.points:
        for policy in (mixed, even):
            assert policy.value > point.value or policy.objective >= point.objective - 1e-12
    objectives = [point.objective for point in curve.points]
    assert objectives == sorted(objectives, reverse=True)
    assert len(set(objectives)) > 3


def test_each_kind_of_budget_has_a_curve_at_which_the_others_hold(tmp_path: Path) -> None:
    budgets = {"average_bits": {"weight": 4, "activation": 4}, "compression_ratio": 5}
    value = tiny()
    value["compression"]["initializer"]["precision"]["budgets"] = budgets
    folder = RunFolder.create(tmp_path / "run", Config.from_json(value))
    table().save(folder.file("importance.json"))
    search(table(), folder.config.budget).policy.save(folder.file("policy.json"))
    by_bitops, by_size = curves(Contents.load(folder.path))
    assert (by_bitops.vary, list(by_bitops.others.to_json())) == ("bitops_ratio", ["compression_ratio"])
    assert (by_size.vary, list(by_size.others.to_json())) == ("compression_ratio", ["average_bits"])
    for curve in (by_bitops, by_size):
        values, place = [point.value for point in curve.points], curve.policies["mixed"]
        assert min(values) - 1e-9 <= place.value <= max(values) + 1e-9


def test_a_run_that_is_not_finished_shows_what_there_is(tmp_path: Path) -> None:
    words = " ".join(read(write_report(write_run(tmp_path / "run", complete=False)).read_text()).words)
    assert "have not been checked yet: nncf-mpq run" in words
    assert "has not been measured: nncf-mpq benchmark" in words
    assert "Fine-tuning" not in words


def test_a_deployment_that_disagrees_is_not_hidden(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", failures=("only 3.0% of samples agree",))
    words = " ".join(read(render(Contents.load(path))).words)
    assert "do not agree with the trained model" in words
    assert "OpenVINO IR: only 3.0% of samples agree" in words
    assert "disagrees" in words


def test_a_policy_edited_by_hand_can_be_reported(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    Policy(dict.fromkeys(NAMES, LayerBits(8, 8)), {"stem": LayerBits(8, 8)}).save(path / "policy.json")
    contents = Contents.load(path)
    assert list(curves(contents)[0].policies) == ["uniform"]  # 8 bits are banned at one layer
    assert "8 / 8" in " ".join(read(render(contents)).words).replace("8.00", "8")


def test_the_same_run_gives_the_same_page(run: Path, page: str) -> None:
    assert render(Contents.load(run)) == page


def test_the_command_writes_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink(missing_ok=True)
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("missing", ["config.json", "policy.json"])
def test_what_is_no_run_is_refused_with_a_hint(tmp_path: Path, missing: str) -> None:
    path = write_run(tmp_path / "run", complete=False)
    (path / missing).unlink()
    with pytest.raises(InputError, match="nncf-mpq run"):
        write_report(path)


def test_the_module_loads_neither_matplotlib_nor_a_framework_before_it_draws() -> None:
    names = ("matplotlib", "torch", "nncf", "openvino")
    code = f"import sys, nncf_mpq_plugin.report.page; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
