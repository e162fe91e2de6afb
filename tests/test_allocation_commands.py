"""The commands that search: options, JSON, and what is said about tables and limits that cannot be used."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import write_tiny

from nncf_mpq_plugin.allocation import BitsConstraint, explain, objective_of, pareto, search, what_if
from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.comparison import METHODS, policy_by_name
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.costs import LatencyTable, limits_of
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError
from nncf_mpq_plugin.runfolder import RunFolder
from nncf_mpq_plugin.search_options import add_search_options, request_of
from nncf_mpq_plugin.tables import binding_table, steps_table
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, Policy

BITS = (2, 3, 4)


def table_json() -> dict[str, Any]:
    """Five layers; ``b`` and ``c`` read one tensor."""
    layers = []
    for index, name in enumerate("abcde"):
        layers.append(
            {
                "name": f"net.{name}",
                "macs": 1000 * (index + 1),
                "weights": 700 - 100 * index,
                "activation_group": "shared" if name in "bc" else f"net.{name}",
                "importance": {
                    tensor: {str(b): (index + 2 + part) / b**2 for b in BITS}
                    for part, tensor in enumerate(("weight", "activation"))
                },
            }
        )
    fixed = [{"name": "net.first", "macs": 9, "weights": 50, "weight_bits": 8, "activation_bits": 8}]
    return {"schema_version": 1, "bits": list(BITS), "layers": layers, "fixed_layers": fixed}


TABLE = ImportanceTable.from_json(table_json())
BUDGET = Budget(average_bits=AverageBits(3, 3), compression_ratio=9.5)
BUDGET_OPTIONS = ["--average-weight-bits", "3", "--average-activation-bits", "3", "--compression-ratio", "9.5"]
LATENCY = LatencyTable({f"net.{name}": {(8, 8): 100, (2, 2): 60, (3, 3): 80, (4, 4): 90} for name in "abcde"})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table_json()))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def test_search_takes_limits_on_layers(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--pin", "net.a:weight=4", "--at-least", "net.[bc]:activation=3", "--at-most", "*:weight=4"]
    policy = answer(capsys, "search", table, *BUDGET_OPTIONS, *limits)["policy"]
    assert policy["net.a"]["weight"] == 4
    assert policy["net.b"]["activation"] == policy["net.c"]["activation"] >= 3


def test_budgets_are_shown_as_they_were_asked_for(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "search", table, *BUDGET_OPTIONS)
    assert code == 0
    assert "budget average_bits: asked 3 / 3 bits, reached 3 / 3 bits" in out
    assert "budget compression_ratio: asked 9.5x, reached 10.329x" in out


def test_weights_alone(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = answer(capsys, "search", table, "--average-weight-bits", 3, "--weight-only")
    assert {bits["activation"] for bits in report["policy"].values()} == {32}
    assert report["budgets"]["average_bits.weight"]["achieved"] <= 3


def test_latency_by_a_measured_table(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LATENCY.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == LATENCY
    options = ["--latency-ratio", "0.8", "--latency-table", tmp_path / "latency.json"]
    report = answer(capsys, "search", table, *options)
    pairs = [(bits["weight"], bits["activation"]) for bits in report["policy"].values()]
    assert sum(LATENCY.nanoseconds["net.a"].get(pair, 100) for pair in pairs) <= 0.8 * 500
    assert report["budgets"]["latency_ratio"]["achieved"] <= 0.8


@pytest.mark.parametrize("vary", ["bitops_ratio", "bitops", "compression_ratio", "model_size_bytes", "latency_ratio"])
def test_sweep_covers_the_range_with_optima(vary: str) -> None:
    sweep = pareto(TABLE, vary, Budget(average_bits=AverageBits(weight=3.5)), points=7, latency=LATENCY)
    objectives = [point.objective for point in sweep.points]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] > objectives[-1]
    loosest = sweep.points[-1]
    assert loosest.objective == search(TABLE, Budget(average_bits=AverageBits(weight=3.5))).objective
    beyond = {vary: sweep.points[0].budgets[vary]["achieved"] * (1.01 if vary == "compression_ratio" else 0.99)}
    with pytest.raises(InfeasibleBudgetError):
        search(TABLE, Budget(average_bits=AverageBits(weight=3.5), **beyond), latency=LATENCY)


def test_pareto_writes_and_draws(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--output", tmp_path / "sweep.json", "--draw", tmp_path / "sweep.png"]
    report = answer(capsys, "pareto", table, "--compression-ratio", 9, "--points", 5, *files)
    assert json.loads((tmp_path / "sweep.json").read_text()) == report
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(report["points"]) == 5
    assert all(point["budgets"]["compression_ratio"]["achieved"] >= 9 for point in report["points"])
    assert all(set(Policy.from_json(point).layers) == {f"net.{name}" for name in "abcde"} for point in report["points"])
    code, out, _ = run(capsys, "pareto", table, "--vary", "bitops", "--points", 60)
    assert code == 0
    assert "60 points" in out


def test_explanation_agrees_with_searches_for_what_it_says() -> None:
    report = explain(TABLE, BUDGET)
    best = search(TABLE, BUDGET)
    assert report.solution.policy.layers == best.policy.layers
    without = {
        "average_bits": search(TABLE, Budget(compression_ratio=9.5)).objective,
        "compression_ratio": search(TABLE, Budget(average_bits=AverageBits(3, 3))).objective,
    }
    for budget in report.budgets:
        assert budget.objective_without == pytest.approx(without[budget.name])
        assert budget.binding == (without[budget.name] < best.objective - 1e-9)
    limits = limits_of(TABLE, BUDGET)
    costs = [layer.cost for layer in TABLE.layers]
    assert {(step.layers, step.tensor) for step in report.steps} >= {(("net.b", "net.c"), "activation")}
    for step in report.steps:
        moved = dict(best.policy.layers)
        for layer in step.layers:
            moved[layer] = type(moved[layer])(**{**vars(moved[layer]), step.tensor: step.to})
        sums = [sum(limit.cost(c, moved[c.name].weight, moved[c.name].activation) for c in costs) for limit in limits]
        assert step.fits == all(used <= limit.bound for used, limit in zip(sums, limits, strict=True))
        assert not (step.fits and step.objective_change < -1e-12), "the optimum can be improved"


def test_a_pin_elsewhere_costs_what_the_search_says(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = BitsConstraint("net.a", "weight", pinned=4)
    result = what_if(TABLE, BUDGET, pin)
    after = search(TABLE, BUDGET, constraints=[pin])
    assert result.after.policy.layers == after.policy.layers
    assert result.objective_change == pytest.approx(after.objective - search(TABLE, BUDGET).objective)
    report = answer(capsys, "what-if", table, *BUDGET_OPTIONS, "net.a:weight=4")
    assert report["after"]["policy"]["net.a"]["weight"] == 4
    assert report["changed"] == result.to_json()["changed"]
    for command in ("explain", "what-if"):
        code, out, _ = run(capsys, command, table, *BUDGET_OPTIONS, *(["net.a=4"] if command == "what-if" else []))
        assert code == 0
        assert "net.a" in out


@pytest.mark.parametrize("method", METHODS)
def test_comparison_policies_by_name_keep_the_budget(
    method: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits, costs = limits_of(TABLE, BUDGET), [layer.cost for layer in TABLE.layers]
    policy = policy_by_name(method, TABLE, BUDGET, seed=3)
    assert policy == policy_by_name(method, TABLE, BUDGET, seed=3) or "seconds" in policy.summary
    bits = policy.layers
    for limit in limits:
        assert sum(limit.cost(c, bits[c.name].weight, bits[c.name].activation) for c in costs) <= limit.bound
    report = answer(capsys, "search", table, *BUDGET_OPTIONS, "--method", method, "--seed", 3)
    assert Policy.from_json(report).layers == bits
    if method != "learned":
        assert report["method"].startswith(method)
        assert report["corrections"] == []
    assert {"status", "bitops", "weight_bits", "compression_ratio", "seconds"} <= report.keys()
    assert report["budgets"]["compression_ratio"]["achieved"] == report["compression_ratio"] >= 9.5
    assert report["objective"] == pytest.approx(objective_of(TABLE, bits, TABLE.default_alpha))


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_a_budget_that_nothing_meets_names_the_nearest_for_any_method(method: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"the nearest that exists is 15\.111x") as error:
        policy_by_name(method, TABLE, Budget(compression_ratio=20))
    assert error.value.achievable is not None


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_of_an_explanation_are_not_broken(width: int) -> None:
    report = explain(TABLE, BUDGET).to_json()
    for row in report["steps"]:
        row["layers"] = ["features.denseblock1.denselayer1.conv1", *row["layers"]]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(steps_table(report))
    console.print(binding_table(report))
    words = console.export_text().split()
    for step in report["steps"]:
        assert f"{step['objective_change']:+.6f}" in words
        assert all(f"{change:+.4g}" in words for change in step["budget_changes"].values())
    assert all(f"{budget['objective_without']:.6f}" in words for budget in report["budgets"])


def test_seeds_differ() -> None:
    for method in ("random", "shuffled"):
        assert len({str(policy_by_name(method, TABLE, BUDGET, seed=seed).layers) for seed in range(8)}) > 1


def test_unknown_method_is_refused() -> None:
    with pytest.raises(InputError, match="inverse_size"):
        policy_by_name("best", TABLE, BUDGET)


IMPOSSIBLE = {
    "smallest size": (
        ["--compression-ratio", "20"],
        "compression_ratio = 20x: the nearest that exists is 15.111x.",
    ),
    "pins are named": (
        [
            "--compression-ratio",
            "12",
            "--pin",
            "net.a=4",
            "--pin",
            "net.[bcde]:weight=4",
            "--pin",
            "net.e:activation=2",
        ],
        "Constraints that cause it: 'net.a' (both pinned 4); 'net.[bcde]' (weight pinned 4); without any",
    ),
    "contradicting pins": (
        ["--compression-ratio", "9", "--pin", "net.a=4", "--at-most", "net.*:weight=3"],
        "Layer 'net.a': no bit width is left by the constraints 'net.a' (both pinned 4); 'net.*' (weight maximum 3)",
    ),
    "pins in one group": (
        ["--compression-ratio", "9", "--pin", "net.b:activation=4", "--pin", "net.c:activation=2"],
        "it shares its activation bits with net.b, net.c",
    ),
    "bits that the table lacks": (["--compression-ratio", "9", "--pin", "net.a=6"], "the table has [2, 3, 4]"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_be_met_is_said_with_its_causes(
    options: list[str], message: str, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "search", table, *options)
    assert code == 3
    assert message in err


def test_budgets_that_contradict_each_other_are_told_apart() -> None:
    fast_at_four = LatencyTable({f"net.{name}": {(8, 8): 100, (4, 4): 10} for name in "abcde"})
    assert search(TABLE, Budget(latency_ratio=0.2), latency=fast_at_four).status == "optimal"
    with pytest.raises(
        InfeasibleBudgetError, match=r"latency_ratio = 0\.2x together with compression_ratio = 15x"
    ) as caught:
        search(TABLE, Budget(latency_ratio=0.2, compression_ratio=15.0), latency=fast_at_four)
    assert caught.value.achievable is not None
    both = Budget(latency_ratio=caught.value.achievable, compression_ratio=15.0)
    assert search(TABLE, both, latency=fast_at_four).status == "optimal"


@pytest.mark.parametrize("budget", [{"bitops_ratio": 0.05}, {"model_size_bytes": 500.0}, {"latency_ratio": 0.5}])
def test_the_nearest_value_can_be_met(budget: dict[str, float]) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        search(TABLE, Budget(**budget), latency=LATENCY)
    (name,) = budget
    assert caught.value.budget == name
    assert caught.value.achievable is not None
    assert search(TABLE, Budget(**{name: caught.value.achievable}), latency=LATENCY).status == "optimal"


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *steps, last, value = path

    def change(table: dict[str, Any]) -> None:
        target: Any = table
        for step in steps:
            target = target[step]
        if value is ...:
            del target[last]
        else:
            target[last] = value

    return change


WEIGHT = ("layers", 2, "importance", "weight")
SENSELESS = {
    "NaN": (_set(*WEIGHT, "3", float("nan")), "NaN is not a valid number"),
    "negative importance": (_set(*WEIGHT, "3", -0.5), "layers[2] (net.c).importance.weight.3: importance must not"),
    "missing importance": (_set(*WEIGHT, "3", ...), "layers[2] (net.c).importance.weight: the key '3' is missing"),
    "missing tensor": (_set("layers", 2, "importance", "activation", ...), "the key 'activation' is missing"),
    "unknown bits": (_set("bits", [2, 3, 9]), "bits[2]: unknown bit width 9"),
    "bits that no layer has": (
        _set("bits", [2, 3, 4, 5]),
        "layers[0] (net.a).importance.weight: the key '5' is missing",
    ),
    "no layers": (_set("layers", []), "the table is empty"),
    "no bits": (_set("bits", []), "at least one bit width"),
    "wrong version": (_set("schema_version", 7), "schema_version: 7 is not supported"),
    "no version": (_set("schema_version", ...), "the key 'schema_version' is missing"),
    "layer twice": (_set("layers", 1, "name", "net.a"), "'net.a' appears twice"),
    "no weights": (_set("layers", 1, "weights", 0), "layers[1].weights: expected a positive integer"),
}


def test_a_runs_alpha_is_the_one_that_its_policy_was_found_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder.create(folder, Config.load(write_tiny(tmp_path)))
    TABLE.save(folder / "importance.json")
    parser = argparse.ArgumentParser()
    add_search_options(parser)

    def alpha(*options: str) -> float | None:
        return request_of(parser.parse_args([str(folder), *options])).arguments["alpha"]

    assert alpha() is None
    search(TABLE, BUDGET, alpha=0.7).policy.save(folder / "policy.json")
    assert alpha() == 0.7
    assert alpha("--alpha", "3") == 3
    (folder / "policy.json").write_text("{")
    assert alpha() is None


@pytest.mark.parametrize("command", [["search"], ["pareto"], ["explain"], ["what-if"]], ids=lambda c: c[0])
@pytest.mark.parametrize(("change", "message"), SENSELESS.values(), ids=SENSELESS.keys())
def test_a_senseless_table_is_refused_with_its_place(
    command: list[str],
    change: Callable[[dict[str, Any]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = table_json()
    change(value)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(value))
    code, _, err = run(capsys, *command, path, "--bitops-ratio", 0.2, *(["net.a=2"] if command == ["what-if"] else []))
    assert code == 2
    assert "broken.json" in err
    assert message in err


BAD_OPTIONS = {
    "pin without bits": (["search", "TABLE", "--bitops", "9e4", "--pin", "net.a"], "expected LAYERS=BITS"),
    "pattern that fits nothing": (["search", "TABLE", "--bitops", "9e4", "--pin", "layer*=4"], "fits no searchable"),
    "latency without a table": (["search", "TABLE", "--latency-ratio", "0.9"], "no latency table was given"),
    "latency table of another model": (
        ["search", "TABLE", "--latency-ratio", "0.9", "--latency-table", "OTHER"],
        "no time for layer 'net.a'",
    ),
    "latency table that is none": (
        ["search", "TABLE", "--latency-ratio", "0.9", "--latency-table", "TABLE"],
        "nanoseconds",
    ),
    "no budget": (["explain", "TABLE"], "No budget is given"),
    "no points": (["pareto", "TABLE", "--points", "1"], "at least 2"),
    "method with pins": (["search", "TABLE", "--bitops", "9e4", "--method", "random", "--pin", "net.a=2"], "takes no"),
    "too loose a gap": (["search", "TABLE", "--bitops", "9e4", "--gap", "-1"], "gap"),
    "no time": (["search", "TABLE", "--bitops", "9e4", "--time-limit", "0"], "time_limit"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_senseless_option_is_refused(
    arguments: list[str], message: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LatencyTable({"other": {(8, 8): 5}}).save(tmp_path / "other.json")
    places = {"TABLE": table, "OTHER": tmp_path / "other.json"}
    code, _, err = run(capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -3.0])
def test_a_budget_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="bitops"):
        search(TABLE, Budget(bitops=value))


def test_a_looser_gap_is_kept_and_reported() -> None:
    best = search(TABLE, BUDGET)
    loose = search(TABLE, BUDGET, gap=0.05)
    assert loose.status == "optimal"
    assert loose.gap is not None
    assert loose.objective <= best.objective * 1.05 + 1e-12
    assert (loose.objective == best.objective) or 0 < loose.gap <= 0.05
