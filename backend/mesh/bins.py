"""Things that fill boxes, sorted into the bins of a grid."""

from __future__ import annotations

import numpy as np

from backend.splats.parallel import kernel


@kernel
def sorted_into_bins(first, last, counts):
    """Which things touch each bin: those of bin i are order[starts[i] : starts[i + 1]], in their own order; returns (order, starts).

    first, last: int64 n x 3, the bins along each axis that a thing touches, both included; none where last is below first. counts: int64 3,
    bins along each axis, of which the last runs fastest.
    """
    starts = np.zeros(counts[0] * counts[1] * counts[2] + 1, np.int64)
    order = np.empty(0, np.int32)
    for fill in range(2):
        for n in range(len(first)):
            for i in range(first[n, 0], last[n, 0] + 1):
                for j in range(first[n, 1], last[n, 1] + 1):
                    for k in range(first[n, 2], last[n, 2] + 1):
                        box = (i * counts[1] + j) * counts[2] + k
                        if fill:
                            order[starts[box]] = n
                            starts[box] += 1
                        else:
                            starts[box + 1] += 1
        if not fill:
            for box in range(len(starts) - 1):
                starts[box + 1] += starts[box]
            order = np.empty(starts[-1], np.int32)
    for box in range(len(starts) - 1, 0, -1):
        starts[box] = starts[box - 1]
    starts[0] = 0
    return order, starts
