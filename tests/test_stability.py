import dataclasses
import json

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_net import data, small_model

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.stability import (
    indicators_at,
    out_of_order,
    rank_agreement,
    settled_agreement,
    spearman,
    stability,
)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs):
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_of_constants():
    assert spearman([1.0, 1.0], [2.0, 2.0]) == 1.0
    assert spearman([1.0, 1.0], [2.0, 3.0]) == 0.0
    assert spearman([1.0], [2.0]) == 1.0


def curves(*records):
    """Three layers' 2- and 4-bit weight scales, one record each, and a fixed quantizer."""
    scales = {
        f"{layer}.weight": {"2": [r[i] for r in records], "4": [r[i] / 4 for r in records]}
        for i, layer in enumerate("abc")
    }
    return {**scales, "stem.weight": {"8": [1.0] * len(records)}}


def test_agreement_is_within_a_bit_width():
    """Scales of different bit widths differ by much; a reversed order of layers must show all the same."""
    scales = curves((1.0, 2.0, 3.0), (3.0, 2.0, 1.0))
    agreement = rank_agreement(indicators_at(scales, 0), indicators_at(scales, 1))
    assert agreement.by_kind == {"weight": {2: -1.0, 4: -1.0}}
    assert agreement.mean == agreement.least == -1.0
    with pytest.raises(InputError, match="different models or bit widths"):
        rank_agreement(indicators_at(scales), {"a.weight": {2: 1.0}})
    with pytest.raises(InputError, match="no searched quantizer"):
        rank_agreement({}, {})


def test_report_finds_where_the_order_settled():
    scales = curves((3.0, 2.0, 1.0), (2.0, 1.0, 3.0), (1.0, 2.0, 3.0), (1.1, 2.0, 3.0), (1.1, 2.2, 3.3))
    report = stability([0, 10, 20, 30, 40], scales, steps_per_epoch=10)
    assert report.with_final == (-1.0, 0.5, 1.0, 1.0, 1.0)
    assert report.settled_at == 20
    assert report.first_epoch.mean == pytest.approx(0.5)
    assert report.indicators == 6
    assert report.out_of_order == ()
    assert report.change == pytest.approx(0.1)
    assert stability([0, 40], curves((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)), 40).first_epoch is None
    json.dumps(report.to_json())


def test_scales_that_rise_with_bits_are_out_of_order():
    assert out_of_order({"a.weight": {2: 0.5, 3: 0.6, 4: 0.1}}) == ("a.weight at 3 bits",)


def test_settled_agreement_looks_back_a_fifth():
    scales = curves((3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    assert settled_agreement(scales, 20) is None
    assert settled_agreement(scales, 5) == 1.0
    assert settled_agreement(scales, 10) == -1.0


CONFIG = JointConfig(epochs=10, data_fraction=1.0, early_stop=0.9)


def test_early_stop_ends_the_training_and_resumes_to_the_same(tmp_path):
    whole, resumed, again = small_model(), small_model(), small_model()
    expected = train_jointly(whole, data(), CONFIG)
    assert 6 <= expected.steps < 30
    assert expected.history.scores["rank_correlation"][-1] >= 0.9
    assert all(value < 0.9 for value in expected.history.scores["rank_correlation"][:-1])

    class Stop(Exception):
        pass

    def progress(step, total, numbers):
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train_jointly(small_model(), data(), CONFIG, state_dir=tmp_path, progress=progress, save_every=2)
    result = train_jointly(resumed, data(), CONFIG, state_dir=tmp_path)
    assert result.history == expected.history
    ran = []
    train_jointly(again, data(), CONFIG, state_dir=tmp_path, progress=lambda *a: ran.append(a))
    assert not ran
    for model in (resumed, again):
        for one, other in zip(whole.model.state_dict().values(), model.model.state_dict().values(), strict=True):
            assert torch.equal(one, other)


def test_without_early_stop_all_steps_are_taken():
    result = train_jointly(small_model(), data(), dataclasses.replace(CONFIG, epochs=3, early_stop=None))
    assert result.steps == 9
    assert result.steps_per_epoch == 3
    assert result.history.scores == {}


def test_the_command_compares_two_runs(tmp_path, capsys):
    for seed in (0, 1):
        result = train_jointly(small_model(), data(), JointConfig(epochs=3, data_fraction=1.0, seed=seed))
        (tmp_path / str(seed) / "joint").mkdir(parents=True)
        (tmp_path / str(seed) / "joint" / "history.json").write_text(json.dumps(result.to_json()))
    assert main(["stability", str(tmp_path / "0"), "--other", str(tmp_path / "1"), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert set(output["agreement"]) == {"first epoch", "other run"}
    assert output["stability"]["steps"][-1] == 9
    assert main(["stability", str(tmp_path / "0"), "--other", str(tmp_path / "1")]) == 0
    assert "other run" in capsys.readouterr().out
    assert main(["stability", str(tmp_path / "none")]) == 2
    assert "train-importance" in capsys.readouterr().err
