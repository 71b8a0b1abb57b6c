"""Best-fit-decreasing bin packing (Johnson 1974), deterministic, O(n log n), and what to lay as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUNDLES_PER_ROW = 8  # and more; larger pieces leave more than 1 % of the rows empty


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Lay items into rows of `capacity`: longest first, each into the fullest row it fits.

    Args:
        lengths: tokens of each item.
        capacity: tokens of a row.

    Returns:
        Rows of item indices, in the order the rows were opened. Example: lengths [2, 5, 3], capacity 5 ->
        [[1], [2, 0]].

    Raises:
        ValueError: an item is empty or longer than a row (names its index).
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r is set when some row has r tokens left
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n = lengths[i]
        if not 0 < n <= capacity:
            raise ValueError(f"item {i} has {n} tokens; a row takes 1 to {capacity}")
        fitting = rooms >> n
        if fitting:
            room = n + (fitting & -fitting).bit_length() - 1  # the least room that fits
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        open_rows[room - n].append(row)
        rooms |= 1 << (room - n)
    return rows


def bundle(lengths: Sequence[int], counts: Sequence[int], most: int) -> np.ndarray:
    """Neighbours that share a prompt together while they have at most `most` tokens; a longer one is alone.

    Args:
        lengths: tokens of each document.
        counts: documents of each prompt.
        most: tokens.

    Returns:
        Where each bundle stops. Example: lengths [2, 2, 3, 1], counts [3, 1], most 4 -> [2, 3, 4].
    """
    stops, place = [], 0
    for count in counts:
        room = 0
        for _ in range(count):
            if lengths[place] > room:
                stops.append(place)
                room = most
            room -= lengths[place]
            place += 1
    return np.array([*stops[1:], place][: len(stops)], np.int64)
