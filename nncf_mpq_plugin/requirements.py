"""
The versions that the plugin works with.

NNCF's internals and the graph transformations of OpenVINO change between releases, silently for the user's numbers; so
an unknown version is refused before anything is trained. pyproject.toml states the same ranges for pip.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Mapping

from nncf_mpq_plugin.errors import UnsupportedVersionError

SUPPORTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.14.1", "2.15"),
    "nncf": ("3.4", "3.5"),
    "openvino": ("2026.4", "2026.5"),
    "onnx": ("1.23", "1.24"),
    "onnxruntime": ("1.32", "1.33"),
}
"""Package -> oldest version that is supported, and oldest that no longer is."""

LEGACY_NNCF = ("2.19", "2.20")
"""NNCF for ``adapters/nncf2.py``; everything else needs that of :data:`SUPPORTED`."""


def supported_here() -> dict[str, tuple[str, str]]:
    """:return: :data:`SUPPORTED`, with NNCF 2.19 where that is installed."""
    try:
        release = _release(importlib.metadata.version("nncf"))
    except importlib.metadata.PackageNotFoundError:
        release = ()
    legacy = _release(LEGACY_NNCF[0]) <= release < _release(LEGACY_NNCF[1])
    return {**SUPPORTED, **({"nncf": LEGACY_NNCF} if legacy else {})}


def check_versions(supported: Mapping[str, tuple[str, str]] = SUPPORTED) -> None:
    """
    Compare what is installed.

    :raises UnsupportedVersionError: naming each package that is missing or of another version, and what to install.
    """
    problems, wanted = [], []
    for package, (oldest, limit) in supported.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not _release(oldest) <= _release(found) < _release(limit):
            problems.append(f"{package} {found} is installed" if found else f"{package} is not installed")
            wanted.append(f'"{package}>={oldest},<{limit}"')
    if problems:
        msg = f"{'; '.join(problems)}. This version of the plugin needs: pip install {' '.join(wanted)}"
        raise UnsupportedVersionError(msg)


def _release(version: str) -> tuple[int, ...]:
    """:return: the numbers of ``1.2.3+cpu`` without zeros at the end; () where it begins with none."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return tuple(reversed([*itertools.dropwhile(lambda part: part == 0, reversed(parts))]))
