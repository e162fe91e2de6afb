"""What the commands that search take on the command line, and what they make of it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nncf_mpq_plugin.allocation.constraints import TENSORS, BitsConstraint
from nncf_mpq_plugin.costs import LatencyTable
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.outliers import OUT_OF_ORDER
from nncf_mpq_plugin.types import Budget, ImportanceTable, Policy

BUDGET_OPTIONS = {
    "average-weight-bits": "average bits of weights; with --average-activation-bits, the BitOps of that uniform policy",
    "average-activation-bits": "average bits of activations",
    "bitops": "BitOps of the searchable layers",
    "bitops-ratio": "BitOps relative to uniform 8 bits",
    "compression-ratio": "32 bits / average weight bits, all layers",
    "model-size-bytes": "bytes of all weights",
    "latency-ratio": "time relative to uniform 8 bits, by the table of --latency-table",
}
LIMIT_OPTIONS = {"pin": "pinned", "at-least": "minimum", "at-most": "maximum"}


@dataclass(frozen=True)
class Request:
    """
    A search as asked for.

    :param table: importances.
    :param budget: limits, None if none were given.
    :param arguments: keyword arguments of :func:`nncf_mpq_plugin.allocation.search`, without ``gap`` and
        ``time_limit``.
    """

    table: ImportanceTable
    budget: Budget | None
    arguments: dict[str, Any]

    def with_budget(self) -> Budget:
        """:raises InputError: if no budget was given."""
        if self.budget is None:
            msg = f"No budget is given. Give one or more of: {', '.join(f'--{name}' for name in BUDGET_OPTIONS)}."
            raise InputError(msg)
        return self.budget


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the table, the budgets and all that shapes the program."""
    parser.add_argument("table", metavar="TABLE", help="an importance table (JSON), or the folder of a run")
    budgets = parser.add_argument_group("budgets (all that are given hold together; for a run: default its config's)")
    for name, text in BUDGET_OPTIONS.items():
        budgets.add_argument(f"--{name}", type=float, metavar="N", help=text)
    budgets.add_argument("--latency-table", metavar="FILE", help="measured times of the layers, for --latency-ratio")
    program = parser.add_argument_group("program")
    program.add_argument(
        "--alpha",
        type=float,
        metavar="N",
        help="weight importance counts N times (default: 2 for learned scales, 0.25 for importances in units of loss)",
    )
    program.add_argument(
        "--out-of-order",
        choices=OUT_OF_ORDER,
        help="an importance that rises with more bits is left out (ban, the default), replaced by the nearest falling "
        "curve (isotonic), or kept",
    )
    program.add_argument("--weight-only", action="store_true", help="leave activations in floating point")
    for name, limit in LIMIT_OPTIONS.items():
        program.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="LAYERS[:TENSOR]=BITS",
            help=f"{limit} bit width of the layers that fit a pattern with *; TENSOR is weight or activation",
        )


def limit_of(text: str, kind: str) -> BitsConstraint:
    """
    Read ``LAYERS[:TENSOR]=BITS``.

    :param kind: ``pinned``, ``minimum`` or ``maximum``.
    :raises InputError: if it does not read so.
    """
    layers, equals, bits = text.rpartition("=")
    name, colon, tensor = layers.rpartition(":")
    if not colon or tensor not in TENSORS:
        name, tensor = layers, "both"
    if not equals or not name or not bits.isdecimal():
        msg = f"{text!r}: expected LAYERS=BITS or LAYERS:TENSOR=BITS, such as 'layer1.*:weight=4'."
        raise InputError(msg)
    limits: dict[str, Any] = {kind: int(bits)}
    return BitsConstraint(name, tensor, **limits)


def asks_for_another_search(options: argparse.Namespace) -> bool:
    """:return: whether anything is asked that differs from what a run's config says."""
    given = (options.alpha, options.out_of_order, options.latency_table, *(limit for limit, _ in _limits(options)))
    return bool(budgets_of(options)) or options.weight_only or any(value is not None for value in given)


def request_of(options: argparse.Namespace) -> Request:
    """
    Read the files and limits that the options name; what they leave out comes from the run's config, if it is a run,
    and an ``alpha`` that the config leaves out from the run's policy.

    :raises InputError: for a file or a limit that cannot be read.
    """
    path, latency_path = Path(options.table), options.latency_table
    alpha, rule, budget, constraints = None, "ban", None, [limit_of(text, kind) for text, kind in _limits(options)]
    if path.is_dir():
        from nncf_mpq_plugin.runfolder import RunFolder

        folder = RunFolder.open(path)
        folder.refuse_another_config()
        path, config = folder.file("importance.json"), folder.config
        rule, budget = config.out_of_order, config.budget
        alpha = _recorded_alpha(folder.file("policy.json")) if config.alpha is None else config.alpha
        latency_path = latency_path or config.latency_table
        constraints = [*(BitsConstraint(**limits) for limits in config.constraints), *constraints]
    limits = budgets_of(options)
    if limits:
        budget = Budget.from_json(limits, "command line")
    arguments = {
        "alpha": alpha if options.alpha is None else options.alpha,
        "out_of_order": options.out_of_order or rule,
        "constraints": tuple(constraints),
        "weight_only": options.weight_only,
        "latency": None if latency_path is None else LatencyTable.load(latency_path),
    }
    return Request(ImportanceTable.load(path), budget, arguments)


def _recorded_alpha(policy: Path) -> float | None:
    """:return: what the run's policy was found with, since the default was another in earlier versions."""
    with contextlib.suppress(InputError):
        recorded = Policy.load(policy).summary.get("alpha")
        return recorded if isinstance(recorded, float) else None
    return None  # there is none yet, or it cannot be read


def budgets_of(options: argparse.Namespace) -> dict[str, Any]:
    """:return: the budgets of the command line, as a config's ``budgets``."""
    given = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in BUDGET_OPTIONS}
    limits: dict[str, Any] = {name: limit for name, limit in given.items() if limit is not None}
    parts = [part for part in ("weight", "activation") if f"average_{part}_bits" in limits]
    average = {part: limits.pop(f"average_{part}_bits") for part in parts}
    return {**limits, "average_bits": average} if average else limits


def _limits(options: argparse.Namespace) -> Sequence[tuple[str, str]]:
    return [(text, kind) for name, kind in LIMIT_OPTIONS.items() for text in getattr(options, name.replace("-", "_"))]
