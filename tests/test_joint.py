import dataclasses
import itertools
import json
import os
import signal

import pytest
import torch
from small_net import data, small_model
from torch import nn

from nncf_mpq_plugin.batches import Batches, derived_seed
from nncf_mpq_plugin.checkpoint import STATE_FILE, load_state
from nncf_mpq_plugin.errors import ConfigError, InputError, InterruptedRun, TrainingError
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, JointResult, select_random, train_jointly
from nncf_mpq_plugin.loop import _FusedSGD, make_optimizer
from nncf_mpq_plugin.training import (
    cross_entropy,
    evaluate,
    named_quantizers,
    output_distance,
    quantizers_off,
    reestimate_batch_norm,
)

CONFIG = JointConfig(epochs=2, data_fraction=1.0)


def state(quantized):
    return {name: value.clone() for name, value in quantized.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def bits_of(quantized):
    return {name: quantizer.active for name, quantizer in named_quantizers(quantized).items()}


def test_schedule_goes_from_high_to_low_and_ends_with_random_bits():
    """Passes in the published order; fixed and stored quantizers stay at 8 bits; one optimizer step a batch."""
    quantized = small_model()
    seen = []
    quantized.model.register_forward_pre_hook(lambda *_: seen.append(bits_of(quantized)))
    steps = []
    train_jointly(quantized, data(), dataclasses.replace(CONFIG, epochs=1), progress=lambda *a: steps.append(a[:2]))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(seen) == 3 * 4
    searched = [name for name, quantizer in named_quantizers(quantized).items() if len(quantizer.bits) > 1]
    for step in range(3):
        for index, bits in enumerate((4, 3, 2)):
            assert {seen[4 * step + index][name] for name in searched} == {bits}
    randoms = [tuple(seen[4 * step + 3][name] for name in searched) for step in range(3)]
    assert len(set(randoms)) == 3
    assert all(len(set(bits)) > 1 for bits in randoms)
    assert all(call[name] == 8 for call in seen for name in call if name not in searched)


def test_gradients_are_the_sum_over_the_passes():
    """The optimizer sees exactly what separate backward passes add up to, clipped element by element."""
    assert CONFIG.gradient_clip == 1  # as published
    clip = 0.25
    config = dataclasses.replace(
        CONFIG, epochs=1, label_smoothing=0.0, batch_norm="shared", momentum=0.0, weight_decay=0.0
    )
    config = dataclasses.replace(config, nesterov=False, gradient_clip=clip)
    loader = [next(iter(data()))]
    quantized, twin = small_model(), small_model()
    train_jointly(quantized, loader, config)
    inputs, targets = loader[0]
    twin.model.train()
    gradients = []
    for bits in (4, 3, 2, None):
        if bits is None:
            select_random(twin, derived_seed(config.seed, 1, 0))
        else:
            twin.select_uniform(bits)
        torch.nn.functional.cross_entropy(twin.model(inputs), targets).backward()
    with torch.no_grad():
        for parameter in twin.model.parameters():
            if parameter.grad is not None:
                gradients.append(parameter.grad.abs().max().item())
                parameter -= config.learning_rate * parameter.grad.clamp(-clip, clip)
    assert max(gradients) > 2 * clip
    for (name, one), other in zip(quantized.model.named_parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)


def test_training_learns_and_its_table_is_ordered():
    quantized = small_model()
    loader = data(128)
    result = train_jointly(quantized, loader, dataclasses.replace(CONFIG, epochs=8, learning_rate=0.02))
    for bits in ("2", "3", "4", "random"):
        assert result.history.losses[bits][-1] < 0.8 * result.history.losses[bits][0]
    quantized.select_uniform(3)
    reestimate_batch_norm(quantized.model, [inputs for inputs, _ in loader])
    assert evaluate(quantized.model, loader).accuracy > 0.8
    table = importance_from_scales(quantized, "small", "test")
    assert [layer.cost.name for layer in table.layers] == ["depthwise", "pointwise", "left", "right"]
    assert [layer.cost.name for layer in table.fixed_layers] == ["stem", "head"]
    for layer in table.layers:
        assert layer.weight[2] > layer.weight[4]
        assert layer.activation[2] > layer.activation[3] > layer.activation[4]
    assert table.layers[2].activation == table.layers[3].activation
    assert table.layers[0].weight[2] == quantized.model.w["depthwise"].scale(2).item()
    assert type(table).from_json(json.loads(json.dumps(table.to_json()))) == table


def test_history_is_complete_and_serialisable():
    quantized = small_model()
    result = train_jointly(quantized, data(), CONFIG)
    assert result.steps == 6
    history = result.history
    assert history.steps == [0, 1, 2, 3, 4, 5, 6]
    assert set(history.losses) == {"4", "3", "2", "random"}
    assert all(len(curve) == 6 for curve in history.losses.values())
    assert set(history.scales) == set(named_quantizers(quantized))
    assert all(len(curve) == 7 for curves in history.scales.values() for curve in curves.values())
    assert history.scales["left.weight"]["2"][-1] == quantized.model.w["left"].scale(2).item()
    assert JointResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_model_is_left_at_the_highest_bits_in_evaluation_mode():
    quantized = small_model()
    train_jointly(quantized, data(), CONFIG)
    assert not quantized.model.training
    assert {q.active for q in named_quantizers(quantized).values() if len(q.bits) > 1} == {4}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in quantized.model.parameters())


def test_switched_statistics_are_those_of_their_bit_width(tmp_path):
    """
    Each pass has its own, the random one too.

    With separate statistics the model ends with the highest bit width's own; shared ones end with a mixture.
    """
    results = {}
    for mode in ("switched", "shared", "frozen"):
        quantized = small_model()
        before = quantized.model.bn2.running_var.clone()
        config = dataclasses.replace(CONFIG, batch_norm=mode, learning_rate=1e-9)
        train_jointly(quantized, data(), config, state_dir=tmp_path / mode)
        results[mode] = quantized.model.bn2.running_var.clone()
        assert torch.equal(results[mode], before) == (mode == "frozen")
    saved, _ = load_state(tmp_path / "switched" / STATE_FILE)
    for bits in (4, 3, 2, "random"):
        reference = small_model()
        reference.model.train()
        step = 0
        with torch.no_grad():
            for epoch in range(2):
                for inputs, _ in Batches(data()).epoch(epoch):
                    if bits == "random":
                        select_random(reference, derived_seed(CONFIG.seed, 1, step))
                    else:
                        reference.select_uniform(bits)
                    reference.model(inputs)
                    step += 1
        names = [name for name, module in reference.model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        kept = saved[f"extra/{bits}/{names.index('bn2')}/running_var"]
        torch.testing.assert_close(kept, reference.model.bn2.running_var, rtol=1e-4, atol=1e-6)
        assert torch.equal(kept, results["switched"]) == (bits == 4)
    assert not torch.allclose(results["shared"], results["switched"], rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_bits_depend_on_the_seed_only(seed):
    one, other = small_model(), small_model()
    select_random(one, seed)
    torch.manual_seed(5)
    select_random(other, seed)
    assert bits_of(one) == bits_of(other)
    select_random(other, seed + 100)
    assert bits_of(one) != bits_of(other)


def test_frozen_weights_stay_and_scales_move():
    quantized = small_model()
    before = state(quantized)
    train_jointly(quantized, data(), dataclasses.replace(CONFIG, train_weights=False))
    after = state(quantized)
    for name in ("stem.weight", "depthwise.weight", "head.weight"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["w.depthwise.scales.2"], after["w.depthwise.scales.2"])
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


def test_label_free_reads_no_targets():
    loader = [inputs for inputs, _ in data()]
    quantized = small_model()
    result = train_jointly(quantized, loader, dataclasses.replace(CONFIG, label_free=True, epochs=4))
    assert result.history.losses["2"][-1] < result.history.losses["2"][0]
    with pytest.raises(InputError, match="no targets"):
        train_jointly(small_model(), loader, CONFIG)


@pytest.mark.parametrize("change", [{"distillation": 0.3}, {"label_free": True}], ids=["in place", "label-free"])
def test_the_teacher_is_the_highest_bit_pass_or_the_floating_point_model(change):
    """Losses of the first step, pass by pass; without labels the highest bits learn from the teacher as well."""
    loader = [next(iter(data()))]
    config = dataclasses.replace(CONFIG, epochs=1, **change)
    losses = train_jointly(small_model(), loader, config).history.losses
    twin, (inputs, targets) = small_model(), loader[0]
    with quantizers_off(twin.model), torch.no_grad():
        floating = twin.model(inputs)
    twin.model.train()
    twin.select_uniform(4)
    highest = twin.model(inputs)
    assert not torch.allclose(highest, floating, rtol=0.01)

    def expected(output, first=False):
        if config.label_free:
            return output_distance(output, floating)
        task = cross_entropy(config.label_smoothing)(output, targets)
        return task if first else 0.3 * output_distance(output, highest) + 0.7 * task

    torch.testing.assert_close(losses["4"][0], expected(highest, first=True).item())
    for name in ("3", "2", "random"):
        if name == "random":
            select_random(twin, derived_seed(config.seed, 1, 0))
        else:
            twin.select_uniform(int(name))
        torch.testing.assert_close(losses[name][0], expected(twin.model(inputs)).item())


def test_what_has_no_gradient_does_not_move():
    """Behind a layer that has died in the first step, neither momentum nor weight decay moves scales or weights."""
    quantized = dataclasses.replace(small_model(), positive=())
    model = quantized.model
    watched = [model.q_pointwise.scale(3), model.w["pointwise"].scale(3), model.pointwise.weight, model.head.weight]
    kept = []

    def progress(step, *_):
        if step == 1:
            kept.extend(parameter.detach().clone() for parameter in watched)
            with torch.no_grad():
                model.bn1.weight.zero_()
                model.bn1.bias.fill_(-1)

    config = dataclasses.replace(CONFIG, epochs=1, weight_decay=0.1)
    start = [parameter.detach().clone() for parameter in watched]
    train_jointly(quantized, data(), config, progress=progress)
    assert not any(torch.equal(before, parameter) for before, parameter in zip(start, kept, strict=True))
    assert [torch.equal(*pair) for pair in zip(watched, kept, strict=True)] == [True, True, True, False]


def test_weights_alone_decay_and_scales_have_their_own_rates():
    quantized = small_model()
    config = JointConfig(scale_learning_rate=0.004, scale_bit_decay=0.5, learning_rate=0.02, weight_decay=0.1)
    names = ("learning_rate", "scale_learning_rate", "scale_bit_decay", "momentum", "weight_decay", "nesterov")
    optimizer = make_optimizer(quantized, "sgd", **{name: getattr(config, name) for name in names})
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in quantized.model.named_parameters():
        rates = {"2": (0.001, 0.0), "3": (0.002, 0.0), "4": (0.004, 0.0), "8": (0.004, 0.0)}
        expected = rates[name.rsplit(".", 1)[1]] if ".scales." in name else (0.02, 0.1 if parameter.dim() > 1 else 0.0)
        assert found[id(parameter)] == pytest.approx(expected), name


def test_momentum_starts_with_a_parameters_first_gradient():
    """As in torch's other ways to do SGD; its fused one refuses such parameters."""

    def trained(make):
        one, other = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
        groups = [{"params": [one, other], "lr": 0.1, "weight_decay": 0.01}]
        optimizer = make(groups)
        for step in range(4):
            one.grad = torch.full_like(one, step + 1.0)
            other.grad = torch.full_like(one, 0.5) if step >= 2 else None
            optimizer.step()
        return one, other

    ours = trained(lambda groups: _FusedSGD(groups, lr=0.1, momentum=0.9, nesterov=True))
    torchs = trained(lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, foreach=False))
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


def test_positive_parameters_stay_positive():
    quantized = small_model()
    with torch.no_grad():
        quantized.model.bn1.weight.fill_(1e-3)
    train_jointly(quantized, data(), dataclasses.replace(CONFIG, learning_rate=0.3, scale_learning_rate=1e-4))
    assert min(parameter.min().item() for parameter in quantized.positive) >= 0.99e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("mode", ["switched", "shared"])
def test_interrupted_training_ends_bit_for_bit_the_same(tmp_path, optimizer, mode):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, batch_norm=mode, epochs=3)
    whole = small_model(dropout=0.3)
    expected = train_jointly(whole, data(), config)

    class Stop(Exception):
        pass

    for stop in (1, 4, 7):

        def progress(step, total, numbers, stop=stop):
            if step == stop:
                raise Stop

        torch.manual_seed(stop)
        with pytest.raises(Stop):
            train_jointly(small_model(dropout=0.3), data(), config, state_dir=tmp_path, progress=progress, save_every=2)
    resumed = small_model(dropout=0.3)
    result = train_jointly(resumed, data(), config, state_dir=tmp_path, save_every=2)
    assert_equal(state(whole), state(resumed))
    assert result.history == expected.history
    again = small_model(dropout=0.3)
    ran = []
    repeated = train_jointly(again, data(), config, state_dir=tmp_path, progress=lambda *a: ran.append(a))
    assert not ran
    assert repeated.history == expected.history
    assert_equal(state(whole), state(again))


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    def progress(step, total, numbers):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun, match=r"step 2 of 6.*same call goes on"):
        train_jointly(small_model(), data(), CONFIG, state_dir=tmp_path, progress=progress)
    steps = []
    quantized, whole = small_model(), small_model()
    train_jointly(quantized, data(), CONFIG, state_dir=tmp_path, progress=lambda step, *_: steps.append(step))
    assert steps == [3, 4, 5, 6]
    train_jointly(whole, data(), CONFIG)
    assert_equal(state(whole), state(quantized))


def test_state_of_other_settings_is_refused(tmp_path):
    train_jointly(small_model(), data(), CONFIG, state_dir=tmp_path)
    with pytest.raises(InputError, match=r"learning_rate: 0\.01 then, 0\.02 now"):
        train_jointly(small_model(), data(), dataclasses.replace(CONFIG, learning_rate=0.02), state_dir=tmp_path)
    with pytest.raises(InputError, match=r"steps_per_epoch: 3 then, 6 now"):
        train_jointly(small_model(), data(96), CONFIG, state_dir=tmp_path)
    with pytest.raises(InputError, match="does not fit this model"):
        train_jointly(small_model(width=12), data(), CONFIG, state_dir=tmp_path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "the loss of pass '2' is nan; the 2-bit scale of 'left.weight' is not finite"),
        (1e9, "the 2-bit scale of 'left.weight' went from"),
    ],
    ids=["NaN", "exploded"],
)
def test_divergence_names_layer_bits_and_step_and_keeps_the_last_good_state(tmp_path, value, found):
    quantized = small_model()
    calls = []

    def poison(*_):
        calls.append(1)
        if len(calls) == 3 * 4 + 1:
            quantized.model.w["left"].scale(2).data.fill_(value)

    quantized.model.register_forward_pre_hook(poison)
    with pytest.raises(TrainingError) as caught:
        train_jointly(quantized, data(), CONFIG, state_dir=tmp_path, save_every=1)
    message = str(caught.value)
    assert f"Training diverged at step 4: {found}" in message
    assert "scale_learning_rate" in message
    assert str(tmp_path) in message
    resumed, whole = small_model(), small_model()
    train_jointly(resumed, data(), CONFIG, state_dir=tmp_path)
    train_jointly(whole, data(), CONFIG)
    assert_equal(state(whole), state(resumed))


def test_values_that_overflow_are_located():
    quantized = small_model()
    with torch.no_grad():
        quantized.model.bn1.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss of pass '4' is nan; .* reach 'pointwise.activation' \(at 4 bits\)"):
        train_jointly(quantized, data(), CONFIG)


def test_gradients_that_are_not_finite_are_located_and_change_nothing():
    quantized = small_model()
    before = {name: parameter.clone() for name, parameter in quantized.model.named_parameters()}

    def loss(output, target):  # finite, with an infinite slope
        return (output - output.detach()).abs().sum().sqrt()

    with pytest.raises(TrainingError, match=r"step 1: the gradient of the \d-bit scale of '.*' is not finite"):
        train_jointly(quantized, data(), CONFIG, loss_fn=loss)
    assert_equal(before, dict(quantized.model.named_parameters()))


def test_exploding_scale_is_named():
    with pytest.raises(TrainingError, match=r"step 1: the \d-bit scale of '.*' went from"):
        train_jointly(small_model(), data(), dataclasses.replace(CONFIG, scale_learning_rate=1e6))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch_norm": "none"}, "switched, shared, frozen"), ({"optimizer": "lion"}, "'sgd' or 'adam'")],
    ids=["batch norm", "optimizer"],
)
def test_unknown_choices_are_config_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        train_jointly(small_model(), data(), dataclasses.replace(CONFIG, **change))


def test_a_scale_changes_by_a_tenth_in_a_step_at_most():
    """The published learning rate is larger than a small 8-bit scale: unlimited, one step takes it to the floor."""
    quantized = small_model()
    result = train_jointly(quantized, data(), dataclasses.replace(CONFIG, epochs=1, scale_learning_rate=1.0))
    changes = []
    for curves in result.history.scales.values():
        for curve in curves.values():
            changes += [after / before for before, after in itertools.pairwise(curve)]
    assert 0.9 - 1e-5 <= min(changes) < 0.91
    assert 1.09 < max(changes) <= 1.1 + 1e-5


def test_switched_and_shared_statistics_train_the_same_scales_and_weights():
    """A pass in training uses its batch's statistics; what differs is the running ones that are left."""
    trained = {}
    for mode in ("switched", "shared"):
        quantized = small_model()
        train_jointly(quantized, data(), dataclasses.replace(CONFIG, batch_norm=mode))
        trained[mode] = {name: parameter.detach() for name, parameter in quantized.model.named_parameters()}
    assert_equal(trained["switched"], trained["shared"])
