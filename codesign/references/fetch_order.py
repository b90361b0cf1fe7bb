"""In which order a block of queries reads its keys and values: SOFA's reuse-aware order (RASS) beside two others.

Order changes how often vectors are read, never a result.

References:
  Wang et al., "SOFA", MICRO 2024, arXiv 2407.10416: what most waiting queries share is read first (23 % fewer memory
  accesses). Phases, ties and both others are reconstructions.
"""

import numpy as np

from codesign.references.integers import Booleans


def reuse_aware_phases(wanted: Booleans, num_vectors: int) -> list[list[int]]:
    """Returns the keys that each phase reads, in order; every key that a query wants is read once.

    A phase begins with all queries that still want something waiting. The key wanted by most waiting queries is read, the
    lowest index among equals; every query that wants it takes it and waits no longer. When nobody waits, all that still
    want something wait again.

    Args:
      wanted: Keys that each query wants, `[T, S]`.
      num_vectors: Vectors that the buffer holds, and a phase reads, >= 1.
    """
    left = np.array(wanted, np.bool_)
    phases: list[list[int]] = []
    while left.any():
        phase: list[int] = []
        waiting = left.any(axis=1)
        while len(phase) < num_vectors and left.any():
            if not waiting.any():
                waiting = left.any(axis=1)
            key = int(np.argmax(left[waiting].sum(axis=0)))
            waiting &= ~left[:, key]
            left[:, key] = False
            phase.append(key)
        phases.append(phase)
    return phases


def reuse_aware_loads(wanted: Booleans) -> int:
    """Returns the vectors that `reuse_aware_phases` reads, of any size of the buffer: the keys that some query wants."""
    return int(np.sum(np.any(wanted, axis=0)))


def cold_loads(wanted: Booleans) -> int:
    """Returns the vectors read when no query shares anything: the sum of what each wants."""
    return int(np.sum(wanted))


def in_order_loads(wanted: Booleans, num_vectors: int) -> int:
    """Returns the vectors read when every query takes its keys from left to right, all queries in step.

    Step by step each query takes its next key. What several ask for in one step is read once, and the buffer keeps the
    vectors used last; a query that comes to a key later than others, when it has left the buffer, reads it again.

    Args:
      wanted: Keys that each query wants, `[T, S]`.
      num_vectors: Vectors that the buffer holds, >= 1.
    """
    queues = [np.flatnonzero(row) for row in wanted]
    held: dict[int, None] = {}  # in order of use, the oldest first
    loads = 0
    for step in range(max((len(queue) for queue in queues), default=0)):
        asked = sorted({int(queue[step]) for queue in queues if step < len(queue)})
        # What is held is served first, so that reading the rest does not push it out.
        asked.sort(key=lambda key: key not in held)
        for key in asked:
            loads += key not in held
            held.pop(key, None)
            held[key] = None
            if len(held) > num_vectors:
                held.pop(next(iter(held)))
    return loads
