"""The JSON config as frozen values that the stages read; :mod:`nncf_mpq_plugin.config_keys` has the keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nncf_mpq_plugin.config_keys import SCHEMA
from nncf_mpq_plugin.errors import ConfigError
from nncf_mpq_plugin.schema import check, describe
from nncf_mpq_plugin.types import Budget, read_json


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from; see the ``data`` section of the config reference."""

    source: str
    arguments: Mapping[str, Any]
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Config:
    """
    A checked config, as the stages read it. ``to_json`` gives the complete config back, defaults included.

    :param checkpoint: absolute path, or None.
    :param joint_training: keyword arguments of ``JointConfig`` (without the seed).
    :param fine_tuning: keyword arguments of ``FinetuneConfig`` (without the seed).
    :param training: keyword arguments of ``FloatConfig`` (without the seed).
    :param constraints: keyword arguments of ``BitsConstraint``, one mapping a limit.
    :param latency_table: absolute path, or None.
    """

    model: str
    model_arguments: Mapping[str, Any]
    checkpoint: str | None
    sample_size: tuple[int, ...]
    data: DataConfig
    training: Mapping[str, Any]
    ignored_scopes: tuple[str, ...]
    num_init_samples: int
    bits: tuple[int, ...]
    fixed_bits: Mapping[str, int]
    joint_training: Mapping[str, Any]
    keep_weights: str
    importance: Mapping[str, Any]
    alpha: float | None
    constraints: tuple[Mapping[str, Any], ...]
    latency_table: str | None
    gap: float
    time_limit: float | None
    refine: Mapping[str, Any]
    out_of_order: str
    budget: Budget
    seed: int
    fine_tuning: Mapping[str, Any]
    uniform_baseline: bool
    target: str
    verify_samples: int
    device: str
    complete: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """:return: the config with every key, from which :meth:`from_json` makes an equal one."""
        return dict(self.complete)

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """
        Read a config file; relative paths in it are relative to its folder.

        :raises ConfigError: listing what is wrong in it, each with its place and the nearest valid choice.
        :raises InputError: if the file cannot be read as JSON.
        """
        path = Path(path)
        return cls.from_json(read_json(path), str(path), path.parent)

    @classmethod
    def from_json(cls, value: Any, place: str = "config", folder: str | Path = ".") -> Config:
        """
        Check a parsed config.

        :param place: what to call it in messages.
        :param folder: what relative paths are relative to.
        :raises ConfigError: as :meth:`load`.
        """
        complete = check(value, SCHEMA, place)
        if complete["checkpoint"] is not None:
            complete["checkpoint"] = _absolute(complete["checkpoint"], folder, f"{place}: checkpoint")
        source = complete["data"]["source"]
        if source.startswith("imagefolder:"):
            directory = _absolute(source.removeprefix("imagefolder:"), folder, f"{place}: data.source")
            complete["data"]["source"] = f"imagefolder:{directory}"
        initializer = complete["compression"]["initializer"]
        precision = initializer["precision"]
        search = precision["search"]
        if search["latency_table"] is not None:
            named = f"{place}: compression.initializer.precision.search.latency_table"
            search["latency_table"] = _absolute(search["latency_table"], folder, named)
        budgets = _given(precision["budgets"])
        place = f"{place}: compression.initializer.precision.budgets"
        # JSON knows lists only, so that a saved and read config compares equal
        complete = json.loads(json.dumps(complete))
        return cls(
            model=complete["model"],
            model_arguments=complete["model_arguments"],
            checkpoint=complete["checkpoint"],
            sample_size=tuple(complete["input_info"]["sample_size"]),
            data=DataConfig(**complete["data"]),
            training=complete["training"],
            ignored_scopes=tuple(complete["compression"]["ignored_scopes"]),
            num_init_samples=initializer["range"]["num_init_samples"],
            bits=tuple(sorted(precision["bits"])),
            fixed_bits=precision["fixed_bits"],
            joint_training=precision["joint_training"],
            keep_weights=precision["keep_weights"],
            importance=precision["importance"],
            alpha=precision["alpha"],
            constraints=tuple(precision["search"]["constraints"]),
            latency_table=precision["search"]["latency_table"],
            gap=precision["search"]["gap"],
            time_limit=precision["search"]["time_limit"],
            refine=precision["search"]["refine"],
            out_of_order=precision["out_of_order"],
            budget=Budget.from_json(budgets, place),
            seed=precision["seed"],
            fine_tuning=complete["fine_tuning"],
            uniform_baseline=complete["uniform_baseline"],
            target=complete["deploy"]["target"],
            verify_samples=complete["deploy"]["verify_samples"],
            device=complete["device"],
            complete=complete,
        )


def _absolute(path: str, folder: str | Path, place: str) -> str:
    """
    :param folder: what a relative path is relative to; ``~`` is the home directory.
    :raises ConfigError: if no file can have such a name.
    """
    try:
        return str((Path(folder) / Path(path).expanduser()).resolve())
    except (ValueError, RuntimeError, OSError) as error:
        msg = f"{place}: {describe(path)} is no path ({error})."
        raise ConfigError(msg) from error


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    """:return: ``value`` without nulls."""
    return {key: _given(item) if isinstance(item, Mapping) else item for key, item in value.items() if item is not None}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """
    :param old: a complete config.
    :param new: another.
    :return: ``key: old value -> new value`` for every key that differs.
    """
    result = []
    for name in old.keys() | new.keys():
        here = f"{place}.{name}" if place else name
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            result += differences(before, after, here)
        elif before != after:
            result.append(f"{here}: {json.dumps(before)} -> {json.dumps(after)}")
    return sorted(result)
