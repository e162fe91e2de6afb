"""What NNCF 2.19's adapter says where NNCF 3 is installed; tests/legacy has the others."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from nncf_mpq_plugin.adapters import nncf2
from nncf_mpq_plugin.errors import InputError

if importlib.metadata.version("nncf").startswith("2."):
    pytest.skip("needs NNCF 3", allow_module_level=True)


def test_nncf_3_is_told_the_way_of_its_own() -> None:
    with pytest.raises(InputError, match=r"in NNCF 2\.19 only.*nncf_mpq_plugin\.quantize\(\.\.\.\) or `nncf-mpq run"):
        nncf2.register()
    assert not nncf2.is_registered()
    nncf2.unregister()


def test_another_version_2_is_told_the_one_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.14.1")
    with pytest.raises(InputError, match=r"NNCF 2\.14\.1 is installed.*Install nncf==2\.19\.\*"):
        nncf2.register()


def test_a_script_is_not_begun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('begun')")
    command = [sys.executable, "-m", "nncf_mpq_plugin.adapters.nncf2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert not result.stdout
    assert result.stderr.startswith("error: NNCF 3")
    assert "Traceback" not in result.stderr
