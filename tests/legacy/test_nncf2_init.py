from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from compressing import Concat, Net, Repeated, Transposed, bits_of, compress, config, data
from nncf import NNCFConfig
from nncf.torch import create_compressed_model, load_state, register_default_init_args
from nncf.torch.initialization import PTInitializingDataLoader
from safetensors.torch import load_file, save_file
from torch import nn

from nncf_mpq_plugin.adapters import nncf2, nncf2_init
from nncf_mpq_plugin.adapters.base import native_quantizers
from nncf_mpq_plugin.errors import ConfigError, InfeasibleBudgetError, InputError, UnsupportedModelError
from nncf_mpq_plugin.types import ImportanceTable, Policy, read_json, write_json

pytestmark = pytest.mark.usefixtures("registered")
DUMPS = "learned_importance_dumps"


def dumps(folder) -> tuple[dict, Policy]:
    """:return: importance by layer, tensor and bits, and the policy."""
    layers = read_json(folder / DUMPS / "importance.json")["layers"]
    return {layer["name"]: layer["importance"] for layer in layers}, Policy.load(folder / DUMPS / "policy.json")


def by_scope(folder) -> dict[str, int]:
    return {scope: bits for bits, scope in json.loads((folder / "bitwidth_per_scope.json").read_text()).popitem()[1]}


def test_bits_reach_the_model_and_weights_are_restored(tmp_path) -> None:
    torch.manual_seed(0)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    controller, compressed = compress(
        model, config(tmp_path, bits=[2, 4, 8], compression_ratio=2.0, dump_init_precision_data=True)
    )
    after = compressed.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert compressed.training
    importance, policy = dumps(tmp_path)
    assert list(policy.layers) == ["conv1", "conv2", "left", "right"]
    assert list(policy.fixed_layers) == ["stem", "head"]
    bits = bits_of(controller)
    assert bits == by_scope(tmp_path)
    for name, chosen in policy.all_layers.items():
        kind = "NNCFLinear" if name == "head" else "NNCFConv2d"
        operation = "linear" if name == "head" else "conv2d"
        assert bits[f"Net/{kind}[{name}]/{operation}_0|WEIGHT"] == chosen.weight
    assert (
        policy.layers["left"].activation == policy.layers["right"].activation == bits["Net/ReLU[relu]/relu__2|OUTPUT"]
    )
    assert all(0 < values["4"] < math.inf for layer in importance.values() for values in layer.values())


@pytest.mark.parametrize("ratio", [1.2, 1.6, 2.4])
def test_the_compression_ratio_is_hawqs(tmp_path, ratio) -> None:
    _, compressed = compress(
        Net(),
        config(tmp_path, bits=[2, 4, 8], compression_ratio=ratio, fixed_bits={}, dump_init_precision_data=True),
    )
    policy = dumps(tmp_path)[1]
    flops = compressed.nncf.get_flops_per_module()
    names = {node: node.split("[")[1].split("]")[0] for node in flops}
    complexity = sum(
        flops[node] * max(policy.all_layers[name].weight, policy.all_layers[name].activation)
        for node, name in names.items()
    )
    expected = 8 * sum(flops.values()) / complexity
    (reached,) = policy.summary["budgets"].values()
    assert reached["achieved"] == pytest.approx(expected)
    assert expected >= ratio


def test_budgets_of_this_package_hold_beside_it(tmp_path) -> None:
    budgets = {"average_bits": {"weight": 3.5, "activation": 5}, "compression_ratio": 5.0}
    compress(
        Net(),
        config(tmp_path, bits=[2, 3, 4, 6], budgets=budgets, compression_ratio=1.3, dump_init_precision_data=True),
    )
    reached = dumps(tmp_path)[1].summary["budgets"]
    assert reached["average_bits"]["achieved"] <= 17.5
    assert reached["compression_ratio"]["achieved"] >= 5.0
    assert reached["compression_ratio (INT8 over mixed complexity)"]["achieved"] >= 1.3
    assert not (tmp_path / DUMPS / "bitwidth_graph.dot").exists()  # NNCF cannot draw 3 bits


def test_without_a_budget_hawqs_default_holds(tmp_path) -> None:
    compress(Net(), config(tmp_path, bits=[2, 4, 8], dump_init_precision_data=True))
    (reached,) = dumps(tmp_path)[1].summary["budgets"].values()
    assert reached["requested"] == 1.5
    assert (tmp_path / DUMPS / "bitwidth_graph.dot").exists()


@pytest.mark.parametrize("source", ["fisher", "loss_change", "scale"])
def test_every_source_of_importance(tmp_path, source) -> None:
    entry = config(tmp_path, bits=[2, 4], compression_ratio=1.5, dump_init_precision_data=True)
    entry["compression"]["initializer"]["precision"]["importance"]["source"] = source
    compress(Net(), entry)
    table = ImportanceTable.load(tmp_path / DUMPS / "importance.json")
    assert table.unit == ("scale" if source == "scale" else "loss")
    assert any(layer.activation[2] > 0 for layer in table.layers)
    assert any(layer.weight[2] > 0 for layer in table.layers)


def test_learned_scales_survive_the_second_range_initialisation(tmp_path, monkeypatch) -> None:
    from nncf_mpq_plugin.adapters.nncf2_init import LearnedImportanceParams

    found = {}
    carry = LearnedImportanceParams.carry_scales
    monkeypatch.setattr(
        LearnedImportanceParams,
        "carry_scales",
        lambda self, *infos: (found.update(self.scales), carry(self, *infos))[1],
    )
    controller, _ = compress(Net(), config(tmp_path, bits=[2, 4], compression_ratio=2.0))
    for infos in (controller.weight_quantizers, controller.non_weight_quantizers):
        for key, info in infos.items():
            native, learned = info.quantizer_module_ref, found.pop(str(key))
            assert learned.bits == native.num_bits
            assert torch.allclose(native.scale.detach() / native.level_high, learned.step), key
    assert not found


RESTORE = """
import json, pathlib, sys
sys.modules["nncf_mpq_plugin"] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import torch
from compressing import Net, bits_of, data
from nncf import NNCFConfig
from nncf.torch import create_compressed_model, load_state
from safetensors.torch import load_file, save_file

torch.set_num_threads(int(sys.argv[3]))
folder = pathlib.Path(sys.argv[2])
state, entry = (json.loads((folder / name).read_text()) for name in ("state.json", "config.json"))
controller, model = create_compressed_model(
    Net(), NNCFConfig.from_dict(entry), compression_state=state, dump_graphs=False
)
load_state(model, load_file(folder / "weights.safetensors"), is_resume=True)
(folder / "bits.json").write_text(json.dumps(bits_of(controller)))
save_file({"outputs": model.eval()(load_file(folder / "images.safetensors")["images"])}, folder / "out.safetensors")
model.train()
images, target = next(iter(data()))
torch.nn.functional.cross_entropy(model(images), target).backward()
moving = {str(key): bool(q._scale_param_storage.grad.any()) for key, q in controller.all_quantizations.items()}
(folder / "moving.json").write_text(json.dumps(moving))
"""


def test_the_state_restores_without_the_plugin(tmp_path) -> None:
    torch.manual_seed(0)
    entry = config(tmp_path, bits=[2, 4, 8], compression_ratio=2.0)
    controller, compressed = compress(Net(), entry)
    entry["compression"]["initializer"].pop("precision")
    images = torch.randn(4, 3, 16, 16)
    write_json(tmp_path / "state.json", controller.get_compression_state())
    write_json(tmp_path / "config.json", entry)
    weights = {name: value.contiguous() for name, value in compressed.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    save_file({"images": images}, tmp_path / "images.safetensors")
    arguments = [os.path.dirname(__file__), str(tmp_path), str(torch.get_num_threads())]
    command = [sys.executable, "-c", RESTORE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_json(tmp_path / "bits.json") == bits_of(controller)
    with torch.no_grad():
        outputs = compressed.eval()(images)
    assert torch.allclose(outputs, load_file(tmp_path / "out.safetensors")["outputs"], rtol=1e-5, atol=1e-6)
    moving = read_json(tmp_path / "moving.json")
    assert not moving.pop("/nncf_model_input_0|OUTPUT")  # its power of two stays
    assert any(moving.values())


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(1e3, 0.0), (0.01, 1.0)])
def test_a_restored_models_step_at_the_input_is_exported_as_a_power_of_two(
    tmp_path, caplog, learning_rate, weight_decay
) -> None:
    torch.manual_seed(0)
    entry = config(tmp_path, bits=[2, 4], compression_ratio=1.5)
    controller, compressed = compress(Net(), entry)
    again, restored = create_compressed_model(
        Net(), NNCFConfig.from_dict(entry), compression_state=controller.get_compression_state(), dump_graphs=False
    )
    load_state(restored, compressed.state_dict(), is_resume=True)
    (quantizer,) = (
        info.quantizer_module_ref for key, info in again.non_weight_quantizers.items() if "model_input" in str(key)
    )
    before = float(quantizer.scale.detach()) / quantizer.level_high
    optimizer = torch.optim.SGD(quantizer.parameters(), learning_rate, weight_decay=weight_decay)
    for images, target in data():
        optimizer.zero_grad()
        nn.functional.cross_entropy(restored(images), target).backward()
        optimizer.step()
    after = float(quantizer.scale.detach()) / quantizer.level_high
    assert math.frexp(before)[0] == 0.5
    assert (after == before) == (weight_decay == 0)
    with caplog.at_level(logging.WARNING, logger="nncf"):
        frozen = native_quantizers(nncf2.freeze(again))["post_hooks.nncf_model_input/0__0.0"]
    assert float(frozen.scale) / frozen.level_high == before
    assert ("moved the step at the input" in caplog.text) == (weight_decay > 0)


def test_several_processes_are_refused(tmp_path) -> None:
    """NNCF calls the initialiser in each of them. "fake" is torch's process group without other processes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(InputError, match=r"in one process, and this script runs in 2.*compression_state"):
            compress(Net(), config(tmp_path, bits=[2, 4]))
    finally:
        torch.distributed.destroy_process_group()


def test_layers_behind_several_quantizers_are_named(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="nncf"):
        controller, _ = compress(Repeated(bias=True), config(tmp_path, bits=[2, 4], compression_ratio=1.1))
    assert "Not searched, since they are called behind several quantizers" in caplog.text
    assert caplog.text.rstrip().endswith(": twice")
    assert bits_of(controller)["Repeated/NNCFConv2d[twice]/conv2d_0|WEIGHT"] == 8


def test_bitwidth_per_scope_feeds_manual_initialisation(tmp_path) -> None:
    controller, _ = compress(Net(), config(tmp_path, bits=[2, 4, 8], compression_ratio=2.0))
    saved = json.loads((tmp_path / "bitwidth_per_scope.json").read_text())
    manual, _ = compress(Net(), config(tmp_path, type="manual", **saved))
    before_additions = ("NNCFConv2d[conv2]/conv2d_0", "ReLU[relu]/relu__3", "ReLU[relu]/relu__4")
    left_out = {f"Net/{name}|OUTPUT": 8 for name in before_additions}
    assert bits_of(manual) == bits_of(controller) | left_out


@pytest.mark.parametrize("device", ["CPU", "ANY"])
def test_devices_that_allow_8_bits_only(tmp_path, device) -> None:
    with pytest.raises(UnsupportedModelError, match='"target_device": "TRIAL"'):
        compress(Net(), config(tmp_path, device=device, bits=[2, 4]))


@pytest.mark.parametrize("build", [Net, Concat])
def test_npu_has_lists_and_unified_scales(tmp_path, build) -> None:
    controller, compressed = compress(build(), config(tmp_path, device="NPU", compression_ratio=1.3))
    for info in controller.weight_quantizers.values():
        assert info.quantizer_module_ref.num_bits in (2, 4, 8)
    for info in controller.non_weight_quantizers.values():
        assert info.quantizer_module_ref.num_bits in (4, 8)
    unified = [info for info in controller.non_weight_quantizers.values() if len(info.affected_insertions) > 1]
    assert unified
    saved = by_scope(tmp_path)
    for info in unified:
        scopes = {f"{point.target_node_name}|OUTPUT" for point in info.affected_insertions}
        assert {saved[scope] for scope in scopes} == {info.quantizer_module_ref.num_bits}
    assert set(bits_of(controller).values()) > {8}
    assert compressed(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


def test_strict_assignment_gives_adjacent_quantizers_one_width(tmp_path) -> None:
    controller, _ = compress(
        Net(), config(tmp_path, bits=[2, 4, 8], compression_ratio=2.0, bitwidth_assignment_mode="strict")
    )
    groups = list(controller.groups_of_adjacent_quantizers)
    assert any(len(group.weight_quantizers) > 1 for group in groups)
    for group in groups:
        widths = {quantizer.num_bits for _, quantizer in (*group.weight_quantizers, *group.activation_quantizers)}
        assert len(widths) == 1
    assert set(bits_of(controller).values()) > {8}


def test_ignored_scopes_stay_in_floating_point(tmp_path) -> None:
    extra = {"ignored_scopes": ["Net/NNCFConv2d[conv1]/conv2d_0"]}
    controller, _ = compress(
        Net(), config(tmp_path, extra=extra, bits=[2, 4], compression_ratio=1.5, dump_init_precision_data=True)
    )
    assert list(dumps(tmp_path)[1].layers) == ["conv2", "left", "right"]
    assert not any("conv1" in name for name in bits_of(controller))


def test_channels_of_weights_keep_scales_of_their_own(tmp_path) -> None:
    extra = {"weights": {"per_channel": True}}
    controller, _ = compress(Transposed(), config(tmp_path, extra=extra, bits=[2, 4], fixed_bits={}))
    shapes = {
        str(key): tuple(info.quantizer_module_ref.scale.shape) for key, info in controller.weight_quantizers.items()
    }
    assert sorted(shapes.values()) == [(1, 4, 1, 1), (4, 1, 1, 1), (6, 1, 1, 1)]
    for info in controller.weight_quantizers.values():
        assert info.quantizer_module_ref.scale.flatten().unique().numel() > 1


def test_asymmetric_quantizers_are_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedModelError, match="asymmetric"):
        compress(Net(), config(tmp_path, extra={"preset": "mixed"}, bits=[2, 4]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"budgets": {"average_bit": {"weight": 3}}}, "did you mean 'average_bits'"),
        ({"iter_number": 10}, "'iter_number' belongs to the type 'hawq'"),
        ({"bits": [2, 9]}, "9 is not one of"),
        ({"compression_ratio": -1}, "must be greater than 0"),
        ({"fixed_bits": {"conv1": 4, "first": 1}}, "1 is not one of"),
    ],
    ids=["budget", "hawq", "bits", "ratio", "fixed"],
)
def test_wrong_keys_and_values(tmp_path, keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(Net(), config(tmp_path, **keys))


def test_a_ratio_that_no_policy_reaches_is_told_before_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nncf2_init, "train_jointly", None)
    with pytest.raises(InfeasibleBudgetError, match="nearest that exists is") as error:
        compress(Net(), config(tmp_path, bits=[4, 8], compression_ratio=3.0))
    assert 1.0 < error.value.achievable < 2.0


def test_data_that_was_not_registered(tmp_path) -> None:
    nncf_config = NNCFConfig.from_dict(config(tmp_path, bits=[2, 4]))
    register_default_init_args(nncf_config, data())  # without a criterion
    with pytest.raises(InputError, match="register_default_init_args"):
        create_compressed_model(Net(), nncf_config, dump_graphs=False)


def test_an_error_leaves_the_model_as_it_was(tmp_path) -> None:
    class Failing(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, output, target):
            self.calls += 1
            if self.calls > 10:  # some steps into joint training
                msg = "no more"
                raise RuntimeError(msg)
            return super().forward(output, target)

    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nncf_config = NNCFConfig.from_dict(config(tmp_path, bits=[4, 8]))
    register_default_init_args(nncf_config, data(), criterion=Failing())
    with pytest.raises(RuntimeError, match="no more"):
        create_compressed_model(model, nncf_config, dump_graphs=False)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_loaders_of_nncfs_own_kind_and_criteria_of_ones_own(tmp_path) -> None:
    class Loader(PTInitializingDataLoader):
        def get_inputs(self, item):
            return (item[0],), {}

        def get_target(self, item):
            return item[1]

    calls = []

    def criterion(outputs, target, loss):
        calls.append(len(target))
        return loss(outputs, target)

    nncf_config = NNCFConfig.from_dict(config(tmp_path, bits=[2, 4], compression_ratio=1.5))
    register_default_init_args(nncf_config, Loader(data()), criterion=nn.CrossEntropyLoss(), criterion_fn=criterion)
    controller, _ = create_compressed_model(Net(), nncf_config, dump_graphs=False)
    assert calls
    assert set(bits_of(controller).values()) > {8}


def test_the_same_seed_finds_the_same(tmp_path) -> None:
    results = []
    for seed in (3, 3):
        torch.manual_seed(0)
        results.append(bits_of(compress(Net(), config(tmp_path, bits=[2, 4, 8], compression_ratio=1.7, seed=seed))[0]))
    assert results[0] == results[1]
