"""Orders in which a block of queries reads keys and values."""

import numpy as np
import pytest

from codesign.references.fetch_order import (
    cold_loads,
    in_order_loads,
    reuse_aware_loads,
    reuse_aware_phases,
)

# Keys 1 and 3 are shared; 0, 2 and 5 are wanted by one query each, 4 by none.
WANTED = np.asarray(
    [[1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]], bool
)


def test_what_most_waiting_queries_share_is_read_first() -> None:
    # 1 serves queries 0 to 2, then 3 the last (and 1, 2 besides); nobody waits, all but query 1 want one more.
    assert reuse_aware_phases(WANTED, 2) == [[1, 3], [0, 2], [5]]
    assert reuse_aware_phases(WANTED, 3) == [[1, 3, 0], [2, 5]]
    assert reuse_aware_phases(WANTED, 8) == [[1, 3, 0, 2, 5]]
    assert reuse_aware_phases(np.zeros((3, 4), bool), 2) == []


def test_a_waiting_query_comes_before_a_key_that_served_ones_share() -> None:
    """Keys 0 and 1 are wanted by queries 0 to 2, key 2 by query 3 alone: it is served before any of the others twice."""
    wanted = np.asarray([[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    assert reuse_aware_phases(wanted, 2) == [[0, 2], [1]]


@pytest.mark.parametrize("num_vectors", [1, 3, 64])
def test_every_wanted_key_is_read_once(num_vectors: int) -> None:
    wanted = np.random.default_rng(num_vectors).random((9, 40)) < 0.2
    phases = reuse_aware_phases(wanted, num_vectors)
    keys = [key for phase in phases for key in phase]
    assert sorted(keys) == np.flatnonzero(wanted.any(axis=0)).tolist()
    assert len(keys) == reuse_aware_loads(wanted)
    assert all(len(phase) == num_vectors for phase in phases[:-1])
    assert reuse_aware_loads(wanted) <= in_order_loads(wanted, num_vectors) <= cold_loads(wanted)


def test_in_order_reads_again_what_has_left_the_buffer() -> None:
    assert cold_loads(WANTED) == 9 and reuse_aware_loads(WANTED) == 5
    # Steps ask for {0, 1, 3}, {1, 2, 3, 5} and {3}: with one vector held, 3, 3 (3 is still there), and 1 again.
    assert in_order_loads(WANTED, 1) == 7
    assert in_order_loads(WANTED, 4) == 5
    late = np.asarray([[1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]], bool)
    assert in_order_loads(late, 4) == 4
