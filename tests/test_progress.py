"""Lines about progress: when they come and what they say."""

import pytest

from nncf_mpq_plugin.progress import ProgressLines, duration


def lines_of(steps: int, seconds_each: float, *, begin: int = 0) -> list[str]:
    now, lines = [0.0], []
    listen = ProgressLines(lines.append, first=2, interval=30, clock=lambda: now[0])
    for step in range(begin + 1, steps + 1):
        now[0] += seconds_each
        listen("float", step, steps, {"loss": 0.5})
    return lines


def test_a_line_comes_early_and_then_at_intervals():
    assert lines_of(100, 1.0) == [
        "  float: 3 of 100, loss 0.500, 2 min left",
        "  float: 33 of 100, loss 0.500, 67 s left",
        "  float: 63 of 100, loss 0.500, 37 s left",
        "  float: 93 of 100, loss 0.500, 7 s left",
    ]


def test_a_short_stage_is_silent_and_a_resumed_one_counts_its_own_steps():
    assert lines_of(10, 0.01) == []
    assert lines_of(2000, 20.0, begin=1000)[0] == "  float: 1002 of 2000, loss 0.500, 5 h 33 min left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (86400, "24 h 00 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
