"""The order in which a race creates sessions."""

from __future__ import annotations


def order_creation(count: int, pair: int) -> list[int]:
    """The order in which the sessions of a pair are created.

    Where a session's memory lies depends on what was created before it. So every model takes every place equally often,
    and every second cycle runs backwards.

    Examples
    --------
    >>> [order_creation(2, pair) for pair in range(4)]
    [[0, 1], [1, 0], [1, 0], [0, 1]]
    >>> [order_creation(3, pair) for pair in range(4)]
    [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    """
    cycle, shift = divmod(pair, count)
    models = list(range(count)) if cycle % 2 == 0 else list(range(count))[::-1]
    return models[shift:] + models[:shift]
