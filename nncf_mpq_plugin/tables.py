"""Tables for people: rich renderables of policies, runs and verifications. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from nncf_mpq_plugin.costs import FLOAT_BITS, INT8, LatencyTable

MOST_POINTS = 25


def policy_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """
    :param rows: entries of :func:`nncf_mpq_plugin.summary.layer_rows`.
    :return: one row a layer: bits, share of BitOps, importance at the chosen bits.
    """
    table = Table(title="Policy", title_justify="left")
    table.add_column("layer", no_wrap=True, min_width=max((len(row["name"]) for row in rows), default=0))
    for heading in ("weight\nbits", "act.\nbits", "share of\nBitOps", "weight\nimportance", "act.\nimportance"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["weight"]),
            str(row["activation"]),
            f"{row['bitops_share']:.1%}",
            _significant(row.get("weight_importance")) if row["searched"] else "fixed",
            _significant(row.get("activation_importance")) if row["searched"] else "fixed",
        )
    return table


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """
    :param results: the ``results`` of a summary.
    :return: one row each for floating point, uniform and mixed bits.
    """
    table = Table("", title="Result", title_justify="left")
    for heading in ("accuracy", "loss", "bits\nW / A", "BitOps", "weights", "compression"):
        table.add_column(heading, justify="right")
    for name, row in results.items():
        average = row["average_bits"]
        table.add_row(
            name,
            "-" if row.get("accuracy") is None else f"{row['accuracy']:.2%}",
            _number(row.get("loss")),
            f"{average['weight']:.2f} / {average['activation']:.2f}".replace("32.00", "32"),
            quantity(row["all_bitops"]),
            f"{quantity(row['weight_bytes'])}B",
            f"{row['compression_ratio']:.2f}x",
        )
    return table


def agreement_table(agreements: Mapping[str, Mapping[str, Any]]) -> Table:
    """
    :param agreements: what was compared -> :class:`nncf_mpq_plugin.stability.RankAgreement` as JSON.
    :return: one row for each and kind of tensor: Spearman's correlation over the layers by bit width.
    """
    bits = sorted({int(b) for row in agreements.values() for kind in row["by_kind"].values() for b in kind})
    table = Table("", "", title="Rank correlation of the learned scales over the layers", title_justify="left")
    for heading in (*(f"{b} bits" for b in bits), "mean"):
        table.add_column(heading, justify="right")
    for name, row in agreements.items():
        for kind, values in row["by_kind"].items():
            by_bits = {int(b): value for b, value in values.items()}
            cells = [f"{by_bits[b]:.3f}" if b in by_bits else "-" for b in bits]
            table.add_row(name, kind, *cells, f"{sum(by_bits.values()) / len(by_bits):.3f}")
    return table


def verification_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: content of verify.json.
    :return: one row a runtime.
    """
    table = Table("runtime", title=f"Agreement with torch on {report['samples']} samples", title_justify="left")
    for heading in ("samples that\nagree", "mean difference\n(of the std)", "same\ntop-1", ""):
        table.add_column(heading, justify="right")
    for row in [report["torch_float64"], *report["runtimes"]]:
        verdict = "ok" if not row["failures"] else "fails"
        if not row["required"]:
            verdict = "reference"
        table.add_row(
            row["name"], f"{row['agreeing']:.1%}", f"{row['mean_difference']:.4%}", f"{row['top1']:.1%}", verdict
        )
    if certificate := report.get("certificate"):  # runs of earlier versions have none
        counts = f"{certificate['certified']} of {certificate['tensors']}"
        table.caption = f"certified: {counts} quantized tensors are rounded alike by every runtime, for all inputs"
        table.caption_justify = "left"
    return table


def benchmark_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: content of benchmark.json.
    :return: one row a model.
    """
    title = f"One inference: {report['cpu']}, {report['threads']} threads, input {'x'.join(map(str, report['shape']))}"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    headings = ("ms", "INT8\n= 1", "default\nms", "INT8\nlayers", "weights\nkB", "files\nkB", "load\nms", "memory\nMB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in report["models"]:
        default, cost, share = row["default_latency"], row["footprint"], row["integer_share"]
        table.add_row(
            row["name"],
            f"{row['latency']['median']:.3f}",
            f"{row['relative_latency']:.2f}",
            "-" if default is None else f"{default['median']:.3f}",
            "-" if share is None else f"{share:.0%}",
            *(f"{row[key] / 1e3:.0f}" for key in ("weight_bytes", "file_bytes")),
            "-" if cost is None else f"{1000 * cost['load_seconds']:.0f}",
            "-" if cost is None else f"{cost['memory_bytes'] / 1e6:.0f}",
        )
    return table


def latency_table(latency: LatencyTable) -> Table:
    """:return: one row a layer: its times in INT8 and in floating point."""
    table = Table("layer", title=f"Time of single layers: {latency.device}", title_justify="left")
    for heading in ("INT8, us", "floating point, us"):
        table.add_column(heading, justify="right")
    for layer, times in latency.nanoseconds.items():
        table.add_row(layer, *(f"{times[bits, bits] / 1e3:.1f}" for bits in (INT8, FLOAT_BITS)))
    return table


def kernel_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: content of benchmark.json.
    :return: one row a layer: its bits, and the precision that each model runs it in.
    """
    models = [model for model in report["models"] if model["kernels"]]
    table = Table(title="Precision that each layer runs in", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("W / A", no_wrap=True)
    for model in models:
        table.add_column(model["name"])
    for layer, (weight, activation) in report["bits"].items():
        found = [model["kernels"].get(layer, "-").split()[0] for model in models]
        table.add_row(layer, f"{weight} / {activation}", *found)
    return table


def search_lines(report: Mapping[str, Any], totals: Mapping[str, Any]) -> list[str]:
    """
    :param report: a policy as JSON, with what the search reports.
    :param totals: of :func:`nncf_mpq_plugin.summary.totals`.
    :return: what the search came to, in words.
    """
    average = totals["average_bits"]
    lines = [
        f"{quantity(totals['bitops'])}BitOps in the searched layers, weights {quantity(totals['weight_bytes'])}B, "
        f"compression {totals['compression_ratio']:.2f}x, average bits {average['weight']:.2f} / "
        f"{average['activation']:.2f}"
    ]
    if "status" in report:
        gap = f" within {report['gap']:.2g}" if report.get("gap") else ""
        lines.append(f"{report['status']}{gap}, objective {report['objective']:.6f}, {report['seconds']:.3f} s")
    for name, budget in report.get("budgets", {}).items():
        lines.append(f"budget {name}: asked {budget['asked']}, reached {budget['reached']}")
    for correction in report.get("corrections", []):
        became = "left out" if correction["used"] is None else f"replaced by {correction['used']:.4g}"
        lines.append(
            f"out of order: {correction['layer']}, {correction['tensor']} at {correction['bits']} bits, {became}"
        )
    return lines


def sweep_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: a sweep as JSON.
    :return: one row a point; of many points every n-th.
    """
    points = report["points"]
    every = max(1, -(-len(points) // MOST_POINTS))
    shown = points[::every] + ([] if (len(points) - 1) % every == 0 else points[-1:])
    table = Table(title=f"Best policies over {report['vary']}, {len(points)} points", title_justify="left")
    for heading in (report["vary"], "objective", "BitOps", "compression", "seconds"):
        table.add_column(heading, justify="right")
    for point in shown:
        table.add_row(
            point["budgets"][report["vary"]]["reached"],
            f"{point['objective']:.6g}",
            quantity(point["bitops"]),
            f"{point['compression_ratio']:.2f}x",
            f"{point['seconds']:.3f}",
        )
    return table


def binding_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: an explanation as JSON.
    :return: one row a budget.
    """
    objective = report["solution"]["objective"]
    table = Table(title=f"Budgets, objective {objective:.6f}", title_justify="left")
    rows = [
        (
            row["name"],
            row["asked"],
            row["reached"],
            f"{row['unused']:.3%}",
            "yes" if row["binding"] else "no",
            f"{row['objective_without']:.6f}",
        )
        for row in report["budgets"]
    ]
    return _filled(table, ("budget", "asked", "reached", "unused", "binds", "objective\nwithout it"), rows)


def steps_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: an explanation as JSON.
    :return: one row a single step up or down, with what it would change.
    """
    table = Table(title="Next bit of each tensor, all others as they are", title_justify="left")
    names = [row["name"] for row in report["budgets"]]
    rows = [
        (
            f"{', '.join(step['layers'])}: {step['tensor']}",
            f"{step['bits']} -> {step['to']}",
            f"{step['objective_change']:+.6f}",
            *(f"{step['budget_changes'][name]:+.4g}" for name in names),
            "yes" if step["fits"] else "no",
        )
        for step in report["steps"]
    ]
    return _filled(
        table, ("tensor", "bits", "objective", *(name.replace("_", "\n", 1) for name in names), "fits"), rows
    )


def _filled(table: Table, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Add columns and rows, of which the first column alone is broken where the terminal is narrow."""
    for index, heading in enumerate(headings):
        if index == 0:
            table.add_column(heading, overflow="fold")
        else:
            width = max(len(text) for text in (*heading.split("\n"), *(row[index] for row in rows)))
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    return table


def what_if_table(report: Mapping[str, Any]) -> Table:
    """
    :param report: a what-if as JSON.
    :return: one row a layer whose bits change.
    """
    before, after = report["before"]["objective"], report["after"]["objective"]
    title = f"Objective {before:.6f} -> {after:.6f}, {report['objective_change']:+.6f}; layers that change"
    table = Table("layer", "bits before (W / A)", "bits after", title=title, title_justify="left")
    for name, bits in report["changed"].items():
        table.add_row(name, *(f"{bits[when]['weight']} / {bits[when]['activation']}" for when in ("before", "after")))
    return table


def quantity(value: float) -> str:
    """:return: ``value`` with three digits and a decimal prefix, e.g. ``36.1 G``."""
    prefixes = ["", "k", "M", "G", "T"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}"


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
