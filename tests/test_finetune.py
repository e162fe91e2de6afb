import dataclasses
import itertools
import json

import pytest
import torch
from small_net import data, small_model

from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.checkpoint import STATE_FILE, load_state, save_state
from nncf_mpq_plugin.errors import ConfigError, InputError
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune, reduce_to_policy, with_fine_tuned_granularity
from nncf_mpq_plugin.loop import Loop
from nncf_mpq_plugin.training import evaluate, named_quantizers, reestimate_batch_norm
from nncf_mpq_plugin.types import LayerBits, Policy

POLICY = Policy(
    {"depthwise": LayerBits(4, 3), "pointwise": LayerBits(2, 4), "left": LayerBits(3, 2), "right": LayerBits(4, 2)}
)
CONFIG = FinetuneConfig(epochs=2)


def state(quantized):
    return {name: value.clone() for name, value in quantized.model.state_dict().items()}


def test_each_quantizer_keeps_one_scale():
    quantized = small_model()
    result = finetune(quantized, POLICY, data(), CONFIG)
    assert result.policy.layers == POLICY.layers
    assert result.policy.fixed_layers == {"stem": LayerBits(8, 8), "head": LayerBits(8, 8)}
    for name, quantizer in named_quantizers(quantized).items():
        assert len(quantizer.scales) == 1, name
        assert quantizer.snap
    assert quantized.model.w["left"].scale().shape == (8, 1, 1, 1)
    assert quantized.model.w["head"].scale().shape == (4, 1)
    assert quantized.model.q_pair.scale().shape == (1,)
    assert not quantized.model.training
    json.dumps(result.to_json())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("initialization", ["trained", "statistics"])
def test_reduction_starts_close_to_the_joint_model(granularity, initialization):
    quantized = small_model()
    quantized.select(POLICY.layers)
    batches = [inputs for inputs, _ in data()]
    scale = quantized.model.w["pointwise"].scale(2).item()
    before = quantized.model(batches[0])
    reduce_to_policy(quantized, POLICY, batches, weight_granularity=granularity, initialization=initialization)
    quantized.model.q_pair.snap = False
    after = quantized.model(batches[0])
    if granularity == "tensor" and initialization == "trained":
        assert torch.equal(before, after)
        assert quantized.model.w["pointwise"].scale().item() == scale
    else:
        assert (before - after).square().mean() < before.var()


def test_joint_model_with_fine_tuned_granularity_starts_as_fine_tuning_does():
    quantized = small_model()
    before = state(quantized)
    batches = [inputs for inputs, _ in data()]
    measured = with_fine_tuned_granularity(quantized, batches)
    assert all(torch.equal(value, before[name]) for name, value in quantized.model.state_dict().items())
    assert measured.model.w["left"].scale(2).shape == (8, 1, 1, 1)
    measured.select(POLICY.layers)
    reduce_to_policy(quantized, POLICY, batches)
    quantized.model.q_pair.snap = quantized.model.q_input.snap = False
    assert torch.equal(measured.model(batches[0]), quantized.model(batches[0]))
    per_layer = with_fine_tuned_granularity(small_model(), batches, "tensor")
    assert all(torch.equal(value, before[name]) for name, value in per_layer.model.state_dict().items())


def test_trained_scales_keep_their_ratio_to_least_error_when_split_by_channel():
    quantized, doubled = small_model(), small_model()
    batches = [inputs for inputs, _ in data()]
    doubled.model.w["left"].scale(3).data *= 2
    for model in (quantized, doubled):
        reduce_to_policy(model, POLICY, batches)
    torch.testing.assert_close(doubled.model.w["left"].scale(), 2 * quantized.model.w["left"].scale())


def test_fine_tuning_learns():
    quantized = small_model()
    loader = data(128)
    result = finetune(quantized, POLICY, loader, dataclasses.replace(CONFIG, epochs=10, learning_rate=0.05))
    assert result.steps == 80
    assert evaluate(quantized.model, loader).accuracy > 0.8


@pytest.mark.parametrize("change", [{"label_free": True}, {"distillation": 0.5}], ids=["label-free", "distillation"])
def test_teacher_is_the_floating_point_model(change):
    loader = [inputs for inputs, _ in data()] if "label_free" in change else data()
    config = dataclasses.replace(CONFIG, epochs=4, learning_rate=0.003, **change)
    result = finetune(small_model(), POLICY, loader, config)
    losses = result.history.losses["train"]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("mode", ["trained", "reestimated", "frozen"])
def test_frozen_batch_norm_is_used_as_it_is(mode):
    """Frozen, a model in training computes what it does in evaluation, keeps its statistics and trains the rest."""
    quantized = small_model()
    before = state(quantized)
    losses = {}

    def progress(step, total, numbers):
        losses.setdefault("first", numbers["train"])

    config = dataclasses.replace(CONFIG, batch_norm=mode)
    finetune(quantized, POLICY, data(48, 48), config, progress=progress)
    after = quantized.model.state_dict()
    kept = [torch.equal(before[name], after[name]) for name in before if "running" in name]
    assert kept
    assert all(kept) if mode == "frozen" else not any(kept)
    assert not torch.equal(before["bn2.weight"], after["bn2.weight"])
    start = small_model()
    reduce_to_policy(start, POLICY, [inputs for inputs, _ in data()])
    evaluated = evaluate(start.model, data()).loss
    assert (losses["first"] == pytest.approx(evaluated, rel=1e-5)) == (mode == "frozen")
    assert not any(module.training for module in quantized.model.modules())


def test_statistics_are_estimated_at_the_final_weights():
    trained, quantized = small_model(), small_model()
    finetune(trained, POLICY, data(), dataclasses.replace(CONFIG, batch_norm="trained"))
    finetune(quantized, POLICY, data(), CONFIG)
    one, other = state(trained), state(quantized)
    different = {name for name in one if not torch.equal(one[name], other[name])}
    assert different == {name for name in one if "running" in name or "num_batches" in name}
    reestimate_batch_norm(trained.model, [inputs for inputs, _ in Batches(data(), seed=CONFIG.seed).take(2048)])
    assert all(torch.equal(value, state(quantized)[name]) for name, value in state(trained).items())


def test_statistics_that_the_training_keeps_are_not_estimated_anew(monkeypatch):
    quantized = small_model()
    norm = quantized.model.bn2
    monkeypatch.setattr(norm, "train", lambda mode=True: torch.nn.Module.train(norm, False), raising=False)
    before = state(quantized)
    finetune(quantized, POLICY, data(), CONFIG)
    after = quantized.model.state_dict()
    kept = {name for name in before if "running" in name and torch.equal(before[name], after[name])}
    assert kept == {"bn2.running_mean", "bn2.running_var"}


def test_statistics_can_be_estimated_after_a_training_that_ended_without(tmp_path):
    finetune(small_model(), POLICY, data(), dataclasses.replace(CONFIG, batch_norm="trained"), state_dir=tmp_path)
    resumed, whole, calls = small_model(), small_model(), []
    finetune(resumed, POLICY, data(), CONFIG, state_dir=tmp_path, progress=lambda *_: calls.append(1))
    finetune(whole, POLICY, data(), CONFIG)
    assert not calls
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(whole).items())


def test_interrupted_fine_tuning_ends_bit_for_bit_the_same(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=3, distillation=0.3)
    whole = small_model(dropout=0.3)
    expected = finetune(whole, POLICY, data(), config)

    def progress(step, total, numbers):
        if step in (2, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(
                small_model(dropout=0.3), POLICY, data(), config, state_dir=tmp_path, progress=progress, save_every=1
            )
    resumed = small_model(dropout=0.3)
    result = finetune(resumed, POLICY, data(), config, state_dir=tmp_path, save_every=1)
    one, other = state(whole), state(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.history == expected.history
    other_policy = Policy({**POLICY.layers, "left": LayerBits(4, 2)})
    with pytest.raises(InputError, match="policy"):
        finetune(small_model(dropout=0.3), other_policy, data(), config, state_dir=tmp_path)


def test_a_state_from_before_a_setting_existed_goes_on(tmp_path):
    finetune(small_model(), POLICY, data(), CONFIG, state_dir=tmp_path)
    tensors, values = load_state(tmp_path / STATE_FILE)
    del values["fingerprint"]["batch_norm"]
    save_state(tmp_path / STATE_FILE, tensors, values)
    with pytest.raises(InputError, match="batch_norm: 'trained' then, 'frozen' now"):
        finetune(small_model(), POLICY, data(), dataclasses.replace(CONFIG, batch_norm="frozen"), state_dir=tmp_path)
    calls = []
    finetune(small_model(), POLICY, data(), CONFIG, state_dir=tmp_path, progress=lambda *_: calls.append(1))
    assert not calls  # it was at its end


def test_learning_rate_warms_up_and_falls(monkeypatch):
    rates = []

    def spy(self, *args):
        original(self, *args)
        rates.append(self.optimizer.param_groups[0]["lr"])

    original = Loop._set_rates
    monkeypatch.setattr(Loop, "_set_rates", spy)
    config = dataclasses.replace(CONFIG, epochs=3, warmup_epochs=1, learning_rate=0.1)
    finetune(small_model(), POLICY, data(), config)
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_granularity": "row"}, "channel, tensor"),
        ({"scale_initialization": "guess"}, "statistics, trained"),
        ({"batch_norm": "switched"}, "reestimated, trained, frozen"),
        ({"optimizer": "x"}, "sgd"),
    ],
    ids=["granularity", "initialization", "batch norm", "optimizer"],
)
def test_unknown_choices_are_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        finetune(small_model(), POLICY, data(), dataclasses.replace(CONFIG, **change))
