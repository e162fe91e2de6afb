from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest
import torch
from compressing import Net, bits_of, compress, config
from nncf import NNCFConfig
from nncf.torch.quantization.algo import QuantizationBuilder
from nncf.torch.quantization.init_precision import PrecisionInitializerFactory

from nncf_mpq_plugin.adapters import nncf2
from nncf_mpq_plugin.errors import MPQError

HAWQ = {"type": "hawq", "bits": [4, 8], "num_data_points": 8, "iter_number": 1, "compression_ratio": 1.2}
MANUAL = {"type": "manual", "bitwidth_per_scope": [[4, "Net/NNCFConv2d[conv1]/conv2d_0|WEIGHT"]]}
OURS = {"type": "learned_importance", "bits": [2, 4, 8], "compression_ratio": 1.5}


def touched() -> tuple:
    """:return: everything that registration changes."""
    from nncf.config.schemata.algo.quantization import PRECISION_INIT_TYPES_VS_DESCRIPTION as types
    from nncf.config.schemata.algo.quantization import PRECISION_INITIALIZER_SCHEMA as schema

    return (
        dict(types),
        json.dumps(schema, sort_keys=True, default=str),
        PrecisionInitializerFactory.__dict__["create"],
        QuantizationBuilder.__dict__["_parse_precision_init_params"],
        QuantizationBuilder.__dict__["initialize"],
    )


def test_unregistering_leaves_nothing_behind() -> None:
    before = touched()
    nncf2.register()
    during = touched()
    nncf2.register()
    assert touched() == during
    assert all(old != new for old, new in zip(before, during, strict=True))
    nncf2.unregister()
    nncf2.unregister()
    assert touched() == before


@pytest.mark.parametrize("precision", [HAWQ, MANUAL, {"type": "none"}], ids=["hawq", "manual", "none"])
def test_other_types_do_the_same_before_between_and_after(tmp_path, precision) -> None:
    results = []
    for step in ("before", "registered", "after"):
        if step == "registered":
            nncf2.register()
        torch.manual_seed(0)
        controller, model = compress(Net(), config(tmp_path, **precision))
        if step == "registered":
            nncf2.unregister()
        torch.manual_seed(1)
        results.append((bits_of(controller), model.eval()(torch.randn(2, 3, 16, 16))))
    assert results[0][0] == results[1][0] == results[2][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], results[2][1])


def test_the_type_is_known_while_registered_only(tmp_path) -> None:
    entry = config(tmp_path, **OURS)
    for _ in range(2):
        with pytest.raises(jsonschema.ValidationError):
            NNCFConfig.from_dict(entry)
        nncf2.register()
        controller, _ = compress(Net(), entry)
        assert set(bits_of(controller).values()) > {8}
        nncf2.unregister()
        with pytest.raises(NotImplementedError):
            PrecisionInitializerFactory.create(nncf2.TYPE)


def test_what_others_changed_since_is_not_undone_with_it(monkeypatch, registered) -> None:
    ours = QuantizationBuilder.__dict__["initialize"]
    monkeypatch.setattr(QuantizationBuilder, "initialize", lambda self, model: ours(self, model))
    with pytest.raises(MPQError, match=r"QuantizationBuilder\.initialize was changed by something else"):
        nncf2.unregister()
    assert nncf2.is_registered()
    monkeypatch.undo()


def test_a_changed_nncf_is_refused(monkeypatch) -> None:
    monkeypatch.delattr(QuantizationBuilder, "_parse_precision_init_params")
    with pytest.raises(MPQError, match="not as expected"):
        nncf2.register()
    assert not nncf2.is_registered()


def test_a_script_that_knows_nothing_of_it(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, nncf, nncf.torch\n"
        "from nncf import NNCFConfig\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['--flag', 'x']\n"
        f"config = NNCFConfig.from_dict({config(tmp_path, **OURS)!r})\n"
        "print(config['compression']['initializer']['precision']['type'])\n"
    )
    command = [sys.executable, "-m", "nncf_mpq_plugin.adapters.nncf2", str(script), "--flag", "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("learned_importance")


def test_without_legacy_tracing_the_message_says_how(tmp_path) -> None:
    code = "import nncf.torch; from nncf_mpq_plugin.adapters import nncf2; nncf2.register()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"})
    assert result.returncode == 1
    assert "NNCF_TORCH_LEGACY_TRACING=1 in the environment before Python starts" in result.stderr
