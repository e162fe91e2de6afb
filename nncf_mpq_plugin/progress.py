"""Lines about a long stage's progress, at intervals: for log files, and for output that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FIRST = 2.0  # seconds until the first line of a stage
INTERVAL = 30.0  # seconds between further ones


@dataclass
class ProgressLines:
    """
    Called with a stage's progress, writes a line now and then, with the time that is left.

    :param write: takes a line.
    :param first: seconds until a stage's first line.
    :param interval: seconds between lines.
    :param clock: seconds.
    """

    write: Callable[[str], None]
    first: float = FIRST
    interval: float = INTERVAL
    clock: Callable[[], float] = time.monotonic
    _begun: dict[str, tuple[float, int]] = field(default_factory=dict)
    _next: float = 0.0

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """
        :param stage: what goes on.
        :param done: steps done; a resumed stage begins with those of before.
        :param total: steps in all.
        :param numbers: the latest losses.
        """
        now = self.clock()
        if stage not in self._begun:
            self._begun[stage] = now, done
            self._next = now + self.first
        if now < self._next or done >= total:
            return
        self._next = now + self.interval
        begin, before = self._begun[stage]
        left = f", {duration((now - begin) / (done - before) * (total - done))} left" if done > before else ""
        loss = f", loss {numbers['loss']:.3f}" if "loss" in numbers else ""
        self.write(f"  {stage}: {done} of {total}{loss}{left}")


def duration(seconds: float) -> str:
    """:return: ``seconds`` for people: ``42 s``, ``12 min``, ``7 h 05 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
