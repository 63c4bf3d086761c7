"""Where batches begin: every so many, or so that what belongs together is asked together."""

from collections.abc import Hashable, Sequence
from itertools import groupby


def batches(count: int, size: int, groups: Sequence[Hashable] | None = None) -> list[range]:
    """Return stretches of ``count`` places of at most ``size``, in their order.

    ``groups`` names what each place belongs to: neighbours of one group stay together where they
    fit, and a batch ends early for that. A group of more than ``size`` is cut on its own.
    """
    if groups is None:
        return [range(start, min(start + size, count)) for start in range(0, count, size)]
    found: list[range] = []
    start = stop = 0
    for _, members in groupby(groups[:count]):
        length = len(list(members))
        if stop > start and stop + length - start > size:
            found.append(range(start, stop))
            start = stop
        stop += length
        while stop - start > size:
            found.append(range(start, start + size))
            start += size
    return [*found, range(start, stop)] if stop > start else found
