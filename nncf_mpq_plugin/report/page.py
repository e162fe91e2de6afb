"""The report: what a run came to, layer by layer, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nncf_mpq_plugin.report import figures, html
from nncf_mpq_plugin.report.contents import Contents
from nncf_mpq_plugin.report.tradeoff import curves
from nncf_mpq_plugin.summary import compare
from nncf_mpq_plugin.tables import quantity
from nncf_mpq_plugin.types import write_text_atomically

FILE = "report.html"
Results = Mapping[str, Mapping[str, Any]]


def write_report(run: str | Path) -> Path:
    """
    Write ``report.html`` into a run's folder, from what the run has left there so far.

    :param run: the folder; it needs an importance table and a policy at least.
    :return: the page's path.
    :raises InputError: if there is no run, nothing to report yet, or a file that cannot be read.
    """
    contents = Contents.load(run)
    path = contents.folder.file(FILE)
    write_text_atomically(path, render(contents))
    return path


def render(contents: Contents) -> str:
    """:return: the page."""
    config, results = contents.folder.config, _results(contents)
    name = contents.folder.path.resolve().name
    body = [
        html.title(name),
        html.paragraph(f"{config.model}, mixed-precision quantization", "note"),
        *_result_section(contents, results),
        *_layer_section(contents),
        *_importance_section(contents),
        *_tradeoff_section(contents),
        *_training_section(contents),
        *_deployment_section(contents),
        html.heading("Made with"),
        *([html.table(("", "version"), list(contents.versions.items()), kind="words")] if contents.versions else []),
        html.folded("The complete config", html.as_json(config.to_json())),
    ]
    return html.page(f"{name}: mixed-precision quantization", body)


def _results(contents: Contents) -> Results:
    """:return: FP32, INT8, uniform and mixed, with accuracies as far as they were measured."""
    measured = contents.summary["results"] if contents.summary else {}
    found = compare(contents.table, contents.policy, contents.uniform)
    return {name: {**measured.get(name, {}), **entry} for name, entry in found.items()}


def _result_section(contents: Contents, results: Results) -> list[str]:
    mixed, floating = results["mixed"], results["float"]
    values = [
        (f"{mixed['compression_ratio']:.1f}x", f"smaller weights: {quantity(mixed['weight_bytes'])}B"),
        (f"{mixed['bitops'] / results['int8']['bitops']:.2f}x", "the BitOps of INT8, searched layers"),
        ("{weight:.2f} / {activation:.2f}".format(**mixed["average_bits"]), "average bits of weights / activations"),
    ]
    if mixed.get("accuracy") is not None:
        values.insert(0, (f"{mixed['accuracy']:.2%}", f"accuracy (FP32: {floating['accuracy']:.2%})"))
    if contents.verification:
        ok = contents.verification["ok"]
        values.append(("agrees" if ok else "disagrees", "deployed files with the trained model"))
    rows = [
        (
            figures.POLICY_NAMES[name],
            "-" if row.get("accuracy") is None else f"{row['accuracy']:.2%}",
            "-" if row.get("loss") is None else f"{row['loss']:.4f}",
            *(f"{row['average_bits'][part]:.3g}" for part in ("weight", "activation")),
            quantity(row["all_bitops"]),
            f"{quantity(row['weight_bytes'])}B",
            f"{row['compression_ratio']:.2f}x",
        )
        for name, row in results.items()
    ]
    headings = ("", "accuracy", "loss", "weight bits", "activation bits", "BitOps", "weights", "compression")
    result = [html.tiles(values), html.heading("Result"), html.table(headings, rows, chosen="mixed")]
    if "uniform" in results:
        text = "INT8: NNCF's post-training quantization. Uniform: the best single pair of bit widths within the budget."
        result.append(html.paragraph(text, "note"))
    budgets = contents.policy.summary.get("budgets", {})
    if budgets:
        cells = [(name, f"{b['requested']:.6g}", f"{b['achieved']:.6g}") for name, b in budgets.items()]
        result.append(html.table(("budget", "asked", "reached"), cells))
        if "average_bits" in budgets:
            text = "average_bits: product of weight and activation bits, weighted by MACs."
            result.append(html.paragraph(text, "note"))
    if sum(row.get("accuracy") is not None for row in results.values()) > 1:
        result.append(html.figures([figures.accuracy_figure(results)]))
    return result


def _layer_section(contents: Contents) -> list[str]:
    rows = [
        (
            row["name"],
            f"{row['weight']}",
            f"{row['activation']}",
            f"{row['bitops_share']:.1%}",
            f"{quantity(row['bytes'])}B",
            *(
                "fixed" if not row["searched"] else "-" if row[key] is None else f"{row[key]:.4g}"
                for key in ("weight_importance", "activation_importance")
            ),
        )
        for row in contents.layers
    ]
    headings = ("layer", "weight bits", "activation bits", "of BitOps", "weights", "weight imp.", "activation imp.")
    return [
        html.heading("Layer by layer"),
        html.paragraph("Pale bars are layers at fixed bits. A layer's numbers show where the pointer rests.", "note"),
        html.wide_figure(figures.layers_figure(contents.layers)),
        html.folded("The same as a table", html.table(headings, rows)),
    ]


def _importance_section(contents: Contents) -> list[str]:
    table = contents.table
    drawings = [figures.importance_figure(table, contents.policy, part) for part in ("weight", "activation")]
    unit = "the learned scales (LIMPQ)" if table.unit == "scale" else "units of loss"
    result = [
        html.heading("Importance"),
        html.paragraph(f"What each layer loses at each bit width, in {unit}. Source: {table.source or 'not named'}."),
        html.figures(drawings),
    ]
    corrections = contents.policy.summary.get("corrections", [])
    if corrections:
        rows = [
            (
                c["layer"],
                c["tensor"],
                str(c["bits"]),
                f"{c['importance']:.4g}",
                "-" if c["used"] is None else f"{c['used']:.4g}",
            )
            for c in corrections
        ]
        listed = html.table(("layer", "tensor", "bits", "importance", "used instead"), rows)
        result.append(html.folded(f"Out of order (more bits, larger importance): {len(corrections)}", listed))
    return result


def _tradeoff_section(contents: Contents) -> list[str]:
    found = curves(contents)
    if not found:
        return []
    text = (
        "Each point is the best policy at one budget, by the sum of importances (lower is better), and costs no "
        "training to find."
    )
    notes = [
        f"Over {figures.VARIED_NAMES[curve.vary]}, the run's {kept} is kept."
        for curve in found
        if (kept := " and ".join(curve.others.to_json()))
    ]
    drawings = [figures.tradeoff_figure(curve, index) for index, curve in enumerate(found)]
    return [
        html.heading("Other budgets"),
        html.paragraph(" ".join((text, *notes))),
        html.figures(drawings),
        html.hint("To choose another:", f"nncf-mpq pareto {contents.folder.path}"),
    ]


def _training_section(contents: Contents) -> list[str]:
    histories, drawings = contents.histories, []
    if "joint" in histories:
        joint = histories["joint"]
        passes = sorted(joint["losses"], key=lambda name: (name == "random", -int(name) if name.isdigit() else 0))
        drawings.append(figures.training_figure("Joint training", "joint", {name: (joint, name) for name in passes}))
    tuned = {
        name: (histories[name], next(iter(histories[name]["losses"])))
        for name in ("mixed", "uniform")
        if name in histories and histories[name]["losses"]
    }
    if tuned:
        drawings.append(figures.training_figure("Fine-tuning", "finetuning", tuned))
    return [html.heading("Training"), html.figures(drawings)] if drawings else []


def _deployment_section(contents: Contents) -> list[str]:
    result, folder = [html.heading("Deployment")], contents.folder.path
    if contents.verification:
        result += _verification(contents.verification)
    else:
        result.append(html.hint("The deployed files have not been checked yet:", f"nncf-mpq run {folder}"))
    if contents.benchmark:
        result += _benchmark(contents.benchmark)
    else:
        result.append(html.hint("Latency has not been measured:", f"nncf-mpq benchmark {folder}"))
    return result


def _verification(report: Mapping[str, Any]) -> list[str]:
    verdict = "agree with" if report["ok"] else "do not agree with"
    rows = []
    for runtime in (report["torch_float64"], *report["runtimes"]):
        state = ("ok" if not runtime["failures"] else "fails") if runtime["required"] else "reference"
        numbers = (f"{runtime['agreeing']:.1%}", f"{runtime['mean_difference']:.4%}", f"{runtime['top1']:.1%}")
        rows.append((runtime["name"], *numbers, state))
    headings = ("runtime", "samples that agree", "mean difference (of the std)", "same top-1", "")
    text = f"The exported files {verdict} the trained model, on {report['samples']} samples."
    failures = [f"{r['name']}: {why}" for r in report["runtimes"] if r["required"] for why in r["failures"]]
    return [
        html.paragraph(text, "good" if report["ok"] else "bad"),
        html.table(headings, rows),
        *(html.paragraph(failure, "bad") for failure in failures),
    ]


def _benchmark(report: Mapping[str, Any]) -> list[str]:
    models: Sequence[Mapping[str, Any]] = report["models"]
    rows = [
        (
            model["name"],
            f"{model['latency']['median']:.3f}",
            f"{model['relative_latency']:.2f}",
            "-" if model["integer_share"] is None else f"{model['integer_share']:.0%}",
            *(f"{model[key] / 1e3:.0f}" for key in ("weight_bytes", "file_bytes")),
            "-" if model["footprint"] is None else f"{1000 * model['footprint']['load_seconds']:.0f}",
            "-" if model["footprint"] is None else f"{model['footprint']['memory_bytes'] / 1e6:.0f}",
        )
        for model in models
    ]
    headings = ("", "ms", "INT8 = 1", "INT8 layers", "weights kB", "files kB", "load ms", "memory MB")
    shape = "x".join(map(str, report["shape"]))
    text = f"One inference on {report['cpu']}, {report['threads']} threads, input {shape}:"
    return [
        html.paragraph(text),
        html.table(headings, rows, chosen="mixed"),
        html.figures([figures.latency_figure(models)]),
    ]
