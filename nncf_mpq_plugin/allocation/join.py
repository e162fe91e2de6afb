"""The best pair of two lists of partial policies."""

from __future__ import annotations

import numpy as np

from nncf_mpq_plugin.allocation.states import States, TooManyStatesError

CHUNK = 1_000_000
MOST_PAIRS = 10_000_000
FAR = 2**62


def best_pair(
    first: States, second: States, left: np.ndarray, multipliers: np.ndarray, room: float
) -> tuple[int, ...] | None:
    """
    Find the pair with the lowest objective that the budgets hold.

    A pair's objective is the bound + how far both lie above the smallest values + multipliers x what the budgets have
    left. So a pair within ``room`` of the bound leaves little of each budget that has a multiplier: with one list
    sorted by its use of one budget, and by coarse steps of another, only short runs of it come into question.

    :param left: what the budgets have left for both. ``[budgets]``.
    :param multipliers: ``[budgets]``.
    :param room: pairs further above the bound need not be found; infinite to find any.
    :return: objective on the grid, and the words of the pair's key; of equal pairs the one with the smallest key. None
        if there is no pair.
    :raises TooManyStatesError: if too many pairs come into question.
    """
    if not len(first) or not len(second):
        return None
    need = left[:, None] - first.use
    rooms = np.maximum(room - first.above - second.above.min(), 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        windows = rooms / multipliers[:, None]
    windows = np.where(np.isfinite(windows) & (windows < FAR), windows, FAR).astype(np.int64) + 1
    spans = np.ptp(second.use, axis=1) + 1
    selective = np.argsort(windows.max(1) / spans, kind="stable")
    fine = int(selective[0])
    smallest = int(second.use[fine].min())
    stride = int(spans[fine]) + 1
    steps, bucket = 1, np.zeros(len(second), np.int64)
    if len(left) > 1 and windows[selective[1]].max() < spans[selective[1]] / 2:
        coarse = int(selective[1])
        width = max(int(windows[coarse].max()), int(spans[coarse]) // 1000) + 1
        bucket = (second.use[coarse] - second.use[coarse].min()) // width
        steps = 2
    key = bucket * stride + (second.use[fine] - smallest)
    order = np.argsort(key, kind="stable")
    key = key[order]
    top = np.clip(need[fine] - smallest, -1, stride - 1)
    bottom = np.clip(need[fine] - smallest - windows[fine], 0, stride)
    runs = []
    for back in range(steps):
        at = (need[coarse] - second.use[coarse].min()) // width - back if steps > 1 else np.zeros_like(top)
        valid = (at >= 0) & (at <= int(bucket.max())) & (top >= bottom)
        start = np.searchsorted(key, at * stride + bottom, side="left")
        stop = np.searchsorted(key, at * stride + top, side="right")
        runs.append((start, np.where(valid, np.maximum(stop - start, 0), 0)))
    if sum(int(length.sum()) for _, length in runs) > MOST_PAIRS:
        raise TooManyStatesError
    best: tuple[int, ...] | None = None
    for start, length in runs:
        ends = np.cumsum(length)
        begin = 0
        while begin < len(length):
            done = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
            part = slice(begin, end)
            rows = np.repeat(np.arange(begin, end), length[part])
            places = np.arange(len(rows)) + np.repeat(start[part] - ends[part] + length[part] + done, length[part])
            columns = order[places]
            for budget in range(len(left)):
                fits = second.use[budget][columns] <= need[budget][rows]
                rows, columns = rows[fits], columns[fits]
            begin = end
            if len(rows):
                cost = first.cost[rows] + second.cost[columns]
                lowest = np.flatnonzero(cost == cost.min())
                keys = first.key[:, rows[lowest]] + second.key[:, columns[lowest]]
                found = int(cost[lowest[0]]), *min(map(tuple, keys.T.tolist()))
                best = found if best is None else min(best, found)
    return best
