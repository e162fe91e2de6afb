"""
A run's folder: its config, its log, and which stages are done.

A stage is done when its marker says so, and its marker names the digests of the files that the stage read. So a stage
runs again when something before it has changed (a policy edited by hand, say), and goes on from its own saved state
when it was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nncf_mpq_plugin.config import Config, differences
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.files import remove_unfinished, unwritable
from nncf_mpq_plugin.types import read_json, write_json

PACKAGES = ("nncf-mpq-plugin", "torch", "torchvision", "nncf", "openvino", "onnx", "onnxruntime", "mip", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """
    :param path: the folder.
    :param config: the run's config.
    """

    path: Path
    config: Config

    @classmethod
    def create(cls, path: str | Path, config: Config, *, restart: bool = False) -> RunFolder:
        """
        Make the folder, or take up the one that is there. A run that left nothing yet may go on with another config.

        :param restart: remove what an earlier run left there first, but for a latency table that the config names.
        :raises InputError: if it belongs to a run with another config (the message shows the difference), holds
            something else, or cannot be written.
        """
        path = Path(path)
        saved = path / "config.json"
        try:
            if not saved.exists() and path.exists() and any(not file.name.startswith(".") for file in path.iterdir()):
                msg = f"{path} is not empty and holds no run (no config.json). Choose another --output."
                raise InputError(msg)
            named = config.latency_table and Path(config.latency_table).resolve()
            removed = [name for name in (*RESULTS, *RECORDS) if (path / name).resolve() != named]
            removed = removed if restart and saved.exists() else []
            refuse_links_outside(path, but=removed)
            for name in removed:
                _remove(path / name)
            cls(path, config).refuse_another_config()
            remove_unfinished(path)
            for file in (saved, path / BEGUN_WITH):
                if not file.exists() or read_json(file) != config.to_json():
                    write_json(file, config.to_json())
            if not (path / "versions.json").exists():
                write_json(path / "versions.json", versions())
        except OSError as error:
            raise unwritable(path, error, "Choose another --output.") from error
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """
        Take up a run by its folder alone.

        :raises InputError: if there is no run.
        """
        saved = Path(path) / "config.json"
        if not saved.is_file():
            msg = f"{path}: there is no run (no config.json in it). Begin one with: nncf-mpq run CONFIG --output {path}"
            raise InputError(msg)
        refuse_links_outside(Path(path))
        return cls(Path(path), Config.load(saved))

    def refuse_another_config(self) -> None:
        """:raises InputError: if what is there was made with another config than this one, as after an edit."""
        begun = next((file for name in (BEGUN_WITH, "config.json") if (file := self.file(name)).exists()), None)
        changes = differences(Config.load(begun).to_json(), self.config.to_json()) if begun else []
        if changes and _left_anything(self.path):
            lines = "\n".join(f"  {change}" for change in changes)
            msg = (
                f"{self.path} holds a run with another config:\n{lines}\n"
                "Choose another --output, or begin anew with --restart (which removes that run). If you edited its "
                f"config.json: what is there was made with the config before; {BEGUN_WITH} still has that."
            )
            raise InputError(msg)

    def file(self, name: str) -> Path:
        """:return: the path of a file of the run."""
        return self.path / name

    def state(self, stage: str) -> Path:
        """:return: the folder of what a stage needs to go on."""
        return self.path / "state" / stage

    def log(self, text: str) -> None:
        """Append a line to log.txt, with the time; a full disk is for the results' writers to report."""
        from nncf_mpq_plugin import distributed  # not above: reading a run needs no torch

        if not distributed.is_main():
            return
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def is_done(self, stage: str, inputs: Sequence[str], outputs: Sequence[str]) -> bool:
        """:return: whether the stage has run on the inputs as they are, and its outputs are there."""
        marker = self._marker(stage)
        if not marker.exists() or not all(self.file(name).exists() for name in (*inputs, *outputs)):
            return False
        return bool(read_json(marker) == self._digests(inputs))

    def begin(self, stage: str, inputs: Sequence[str], *, needed_by: str) -> None:
        """
        Prepare a stage: drop a saved state that belongs to other inputs.

        :param needed_by: how to say in a message what is to run first.
        :raises InputError: if an input is missing.
        """
        for name in inputs:
            if not self.file(name).exists():
                msg = f"{self.path}: the stage {stage!r} needs {name}, which is not there yet. {needed_by}"
                raise InputError(msg)
        begun = self.state(stage) / "inputs.json"
        digests = self._digests(inputs)
        if begun.exists() and read_json(begun) == digests:
            return
        _remove(self.state(stage))
        _remove(self._marker(stage))
        write_json(begun, digests)

    def finish(self, stage: str, inputs: Sequence[str]) -> None:
        """Mark a stage as done."""
        write_json(self._marker(stage), self._digests(inputs))

    def forget(self, stage: str) -> None:
        """Let a stage run again on the same inputs."""
        _remove(self._marker(stage))

    def _marker(self, stage: str) -> Path:
        return self.path / "state" / f"{stage}.done.json"

    def _digests(self, names: Sequence[str]) -> dict[str, str]:
        return {name: _digest(self.file(name)) for name in names}


RESULTS = (
    *("float", "joint", "importance.json", "policy.json", "uniform_policy.json", "uniform", "int8", "model"),
    *("deploy", "verify.json", "benchmark.json", "latency.json", "report.html", "summary.json"),
)
RECORDS = ("log.txt", "state", "versions.json", "config.json")
BEGUN_WITH = "state/config.json"  # a copy of config.json, which people may edit


def refuse_links_outside(path: Path, but: Sequence[str] = ()) -> None:
    """
    A run's folder may come from a stranger: what is written into it must stay in it.

    :param but: names in it that are not looked at.
    :raises InputError: if a link in it leads elsewhere.
    """
    inside = os.path.realpath(path)
    for entry in path.rglob("*"):
        if entry.relative_to(path).parts[0] in but:
            continue
        if entry.is_symlink() and not Path(target := os.path.realpath(entry)).is_relative_to(inside):
            msg = (
                f"{entry} is a link to {target}, outside the run's folder: results would be written there. "
                "Remove the link, or link the whole folder."
            )
            raise InputError(msg)


def _left_anything(path: Path) -> bool:
    """:return: whether a run has a result, or training that can go on."""
    return any((path / name).exists() for name in RESULTS) or any((path / "state").glob("*/state.safetensors"))


@contextlib.contextmanager
def taken(path: str | Path, config: Config, *, restart: bool = False) -> Iterator[RunFolder]:
    """
    :meth:`RunFolder.create` with the folder :func:`locked`, by the first process for all of them.

    :raises InputError: as these do.
    """
    from nncf_mpq_plugin import distributed

    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(locked(path))
            RunFolder.create(path, config, restart=restart)

        distributed.on_main(begin)
        yield RunFolder(Path(path), config)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """
    Make the folder and keep other processes out of it; the lock goes with the process, however that ends.

    :raises InputError: if another process works in it, or it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        # a link in its place is not followed: the folder may be a stranger's
        file = os.fdopen(os.open(Path(path) / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        raise unwritable(Path(path), error, "Choose another --output.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = f"{path}: another process is working on this run. Wait for it, or choose another --output."
            raise InputError(msg) from error
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
            if not file.closed:  # as it is in a forked child; one that has just begun may still have it open
                fcntl.flock(file, fcntl.LOCK_UN)


_locks: set[IO[str]] = set()


def _let_go() -> None:
    for file in _locks:
        file.close()


# data loaders' workers and telemetry are forked; those that outlive a killed run must not hold its lock
os.register_at_fork(after_in_child=_let_go)


def versions() -> dict[str, Any]:
    """:return: what the run was made with."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
