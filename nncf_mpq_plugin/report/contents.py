"""What a run's folder holds of what a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.runfolder import RunFolder
from nncf_mpq_plugin.summary import layer_rows
from nncf_mpq_plugin.types import ImportanceTable, Policy, read_json

HISTORIES = {"joint": "joint/history.json", "mixed": "model/history.json", "uniform": "uniform/history.json"}


@dataclass(frozen=True)
class Contents:
    """
    A run as far as it has come; what is not there yet is None or missing.

    :param folder: the run's folder.
    :param table: importances.
    :param policy: the chosen bits.
    :param uniform: the uniform policy within the same budget.
    :param layers: every layer, in the network's order; entries of :func:`nncf_mpq_plugin.summary.layer_rows`.
    :param histories: ``joint``, ``mixed`` and ``uniform`` -> :class:`nncf_mpq_plugin.loop.History` as JSON.
    :param summary: content of summary.json.
    :param verification: content of verify.json.
    :param benchmark: content of benchmark.json.
    :param versions: content of versions.json.
    """

    folder: RunFolder
    table: ImportanceTable
    policy: Policy
    uniform: Policy | None
    layers: tuple[Mapping[str, Any], ...]
    histories: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    verification: Mapping[str, Any] | None
    benchmark: Mapping[str, Any] | None
    versions: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Contents:
        """
        Read a run.

        :raises InputError: if it is none, has no policy yet, or has a file that cannot be read.
        """
        folder = RunFolder.open(path)
        for name in ("importance.json", "policy.json"):
            if not folder.file(name).exists():
                msg = f"{path}: there is nothing to report yet ({name} is missing). Run it first: nncf-mpq run {path}"
                raise InputError(msg)
        table, policy = (
            ImportanceTable.load(folder.file("importance.json")),
            Policy.load(folder.file("policy.json")),
        )

        def optional(name: str) -> Any:
            return read_json(folder.file(name)) if folder.file(name).exists() else None

        found = {name: optional(file) for name, file in HISTORIES.items()}
        histories = {name: value.get("history", value) for name, value in found.items() if value}
        uniform = folder.file("uniform_policy.json")
        return cls(
            folder,
            table,
            policy,
            Policy.load(uniform) if uniform.exists() else None,
            _in_order(layer_rows(table, policy), histories.get("joint")),
            histories,
            optional("summary.json"),
            optional("verify.json"),
            optional("benchmark.json"),
            optional("versions.json") or {},
        )


def _in_order(rows: list[dict[str, Any]], joint: Mapping[str, Any] | None) -> tuple[dict[str, Any], ...]:
    """
    A table lists fixed layers last; joint training records all of them in the network's order.

    :return: the rows, in that order where it is known.
    """
    scales = joint["scales"] if joint else {}
    places = {name.removesuffix(".weight"): index for index, name in enumerate(scales) if name.endswith(".weight")}
    return tuple(sorted(rows, key=lambda row: places.get(row["name"], len(places))))
