"""The report's figures. Each is drawn for a phone's width, but those with a bar a layer are as wide as the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nncf_mpq_plugin.report.svg import colour, depth_colour, style, tip, to_svg
from nncf_mpq_plugin.report.tradeoff import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nncf_mpq_plugin.types import ImportanceTable, Policy

WIDTH, HEIGHT = 5.0, 3.3  # inches; 72 units each, and a phone has about 360
VARIED_NAMES = {
    "bitops_ratio": "BitOps relative to INT8",
    "compression_ratio": "compression of the weights (FP32 = 1)",
    "latency_ratio": "latency relative to INT8, by the measured table",
}
POLICY_NAMES = {"float": "FP32", "int8": "INT8", "uniform": "uniform", "mixed": "mixed"}


def layers_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """
    Bits, share of BitOps and share of bytes of every layer.

    :param rows: entries of :func:`nncf_mpq_plugin.summary.layer_rows`.
    :return: an ``<svg>`` element.
    """
    from matplotlib.figure import Figure

    names, places = [row["name"] for row in rows], range(len(rows))
    bits = {sign: [min(row[part], 8) for row in rows] for sign, part in ((1, "weight"), (-1, "activation"))}
    stored = sum(row["bytes"] for row in rows)
    with style():
        figure = Figure(figsize=(max(WIDTH, 0.7 + 0.21 * len(rows)), 5.2), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[2.4, 1, 1])
        for sign, part in ((1, "weight"), (-1, "activation")):
            heights = [sign * height for height in bits[sign]]
            bars = above.bar(places, heights, color=colour(part), width=0.75)
            for bar, row in zip(bars, rows, strict=True):
                bar.set_gid(tip(f"{row['name']}: {row[part]}-bit {part}s{'' if row['searched'] else ', fixed'}"))
                if not row["searched"]:
                    bar.set_alpha(0.45)
        above.axhline(0, color=colour("muted"), linewidth=0.8)
        above.set_ylim(-9.4, 9.4)
        above.set_yticks([-8, -6, -4, -2, 0, 2, 4, 6, 8], labels=[str(abs(n)) for n in range(-8, 9, 2)])
        above.set_ylabel("bits")
        for offset, words, part in ((0, "weights up", "weight"), (70, "activations down", "activation")):
            where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
            above.annotate(words, (0, 1), xytext=(offset, 6), color=colour(part), **where)
        for axes, values, label, part in (
            (middle, [100 * row["bitops_share"] for row in rows], "% of\nBitOps", "other"),
            (below, [100 * row["bytes"] / stored for row in rows], "% of\nbytes", "weight"),
        ):
            for bar, row, value in zip(
                axes.bar(places, values, color=colour(part), width=0.75), rows, values, strict=True
            ):
                bar.set_gid(tip(f"{row['name']}: {value:.1f} {label.replace(chr(10), ' ')}"))
            axes.set_ylabel(label)
        below.set_xticks(places, labels=names, rotation=90, fontsize=9)
        for axes in (above, middle, below):
            axes.grid(axis="x", visible=False)
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.6, len(rows) - 0.4)
        return to_svg(figure, "layers", "Bits, share of BitOps and share of bytes of every layer")


def importance_figure(table: ImportanceTable, policy: Policy, part: str) -> str:
    """
    Importance over bits, a curve a layer from the input (light) to the output, with the chosen bits as dots.

    :param part: ``weight`` or ``activation``.
    :return: an ``<svg>`` element.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        last = max(1, len(table.layers) - 1)
        chosen: dict[tuple[int, float], str] = {}
        for index, layer in enumerate(table.layers):
            curve = dict(sorted(getattr(layer, part).items()))
            name, bits = layer.cost.name, getattr(policy.layers[layer.cost.name], part)
            (line,) = axes.plot(list(curve), list(curve.values()), color=depth_colour(index / last), linewidth=1.2)
            line.set_gid(tip(f"{name}: {bits} bits chosen"))
            if bits in curve:
                chosen[bits, curve[bits]] = depth_colour(index / last)
        for (bits, value), shade in chosen.items():
            axes.plot([bits], [value], marker="o", markersize=5, color=shade, linestyle="none")
        values = [value for layer in table.layers for value in getattr(layer, part).values()]
        _logarithmic(axes, values)
        axes.set_xticks(table.bits)
        axes.set_xlabel(f"bits of {part}s (dot: chosen)")
        axes.set_ylabel(f"importance ({table.unit})")
        for share, place, word in ((0.0, 0.99, "first layers"), (1.0, 0.91, "last layers")):
            axes.text(0.99, place, word, transform=axes.transAxes, color=depth_colour(share), ha="right", va="top")
        return to_svg(figure, f"importance-{part}", f"Importance of {part}s over bits, one curve a layer")


def tradeoff_figure(curve: Curve, index: int) -> str:
    """:return: the optimum's objective over one budget, and where the run's policies lie, as an ``<svg>`` element."""
    from matplotlib.figure import Figure

    label = VARIED_NAMES[curve.vary]
    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        values = [point.value for point in curve.points]
        axes.plot(values, [point.objective for point in curve.points], color=colour("muted"), marker=".", markersize=5)
        for name, marker, offset in (("uniform", "s", (0, 8)), ("mixed", "o", (0, -16))):
            if name in curve.policies:
                place = curve.policies[name]
                axes.plot([place.value], [place.objective], marker=marker, markersize=8, color=colour(name))
                where: dict[str, Any] = {
                    "xytext": offset,
                    "textcoords": "offset points",
                    "fontweight": "bold",
                    "ha": "center",
                }
                axes.annotate(name, (place.value, place.objective), color=colour(name), **where)
        _logarithmic(axes, [point.objective for point in (*curve.points, *curve.policies.values())])
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel(label)
        axes.set_ylabel("sum of importances")
        return to_svg(figure, f"tradeoff-{index}", f"Best sum of importances over {label}")


def training_figure(title: str, name: str, curves: Mapping[str, tuple[Mapping[str, Any], str]]) -> str:
    """
    Losses over steps.

    :param title: what is trained.
    :param name: of the figure.
    :param curves: label -> (a history as JSON, pass whose losses are shown).
    :return: an ``<svg>`` element.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for index, (label, (history, which)) in enumerate(curves.items()):
            if label in POLICY_NAMES:
                shade, dashes = colour(label if label != "float" else "other"), "solid"
            else:
                shade, dashes = depth_colour(index / max(1, len(curves) - 1)), "solid"
            if label == "random":
                shade, dashes = colour("other"), "dashed"
            losses = history["losses"][which]
            shown = POLICY_NAMES.get(label, label if label == "random" else f"{label} bits")
            axes.plot(history["steps"][1 : len(losses) + 1], losses, color=shade, linestyle=dashes, label=shown)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(fontsize=9, ncols=2)
        return to_svg(figure, name, f"{title}: loss over steps")


def accuracy_figure(results: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Accuracy over weight size.

    :param results: name -> ``accuracy`` and ``weight_bytes``; without accuracy it is left out.
    :return: an ``<svg>`` element.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    shown = {name: row for name, row in results.items() if row.get("accuracy") is not None}
    with style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for name, row in shown.items():
            shade = colour(name if name in ("mixed", "uniform") else "other")
            place = (row["weight_bytes"] / 1e3, 100 * row["accuracy"])
            axes.plot(*place, marker="o" if name == "mixed" else "s", markersize=8, color=shade)
            below = name == "uniform"
            where: dict[str, Any] = {"xytext": (0, -9 if below else 8), "textcoords": "offset points", "ha": "center"}
            axes.annotate(
                POLICY_NAMES[name], place, color=shade, fontweight="bold", va="top" if below else "bottom", **where
            )
        axes.set_xscale("log")
        axes.margins(x=0.2, y=0.25)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        ticks = [row["weight_bytes"] / 1e3 for row in shown.values()]
        axes.set_xticks(_apart(ticks), labels=[f"{tick:.3g}" for tick in _apart(ticks)])
        axes.set_xlabel("weights, kB (log)")
        axes.set_ylabel("accuracy, %")
        return to_svg(figure, "accuracy", "Accuracy over size of the weights")


def latency_figure(models: Sequence[Mapping[str, Any]]) -> str:
    """
    Median latency with quartiles.

    :param models: ``models`` of benchmark.json.
    :return: an ``<svg>`` element.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(models)), layout="constrained")
        axes = figure.subplots()
        for index, model in enumerate(models):
            latency, shade = model["latency"], colour("mixed" if model["name"].startswith("mixed") else "other")
            spread = [[latency["median"] - latency["low"]], [latency["high"] - latency["median"]]]
            axes.barh(index, latency["median"], xerr=spread, color=shade, ecolor=colour("muted"), height=0.6)
        axes.set_yticks(range(len(models)), labels=[model["name"] for model in models])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms an inference (median and quartiles)")
        return to_svg(figure, "latency", "Latency of each model")


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic where values span decades; with zeros, below the last four it is linear."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    positive = [value for value in values if value > 0]
    if not positive or max(positive) < 10 * min(positive):
        return
    if len(positive) == len(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 500 * min(values) else (1,)))
    else:
        lowest = 10.0 ** math.ceil(math.log10(max(min(positive), 1e-4 * max(positive))))
        axes.set_yscale("symlog", linthresh=lowest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="minor", length=0, labelleft=False)


def _apart(values: Sequence[float], factor: float = 1.4) -> list[float]:
    """:return: the values, without those that are less than ``factor`` above the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept
