"""Candidate loop nests: all orders of a few factors, or all divisors in orders that can be best; NumPy only.

References:
  Symons et al., "LOMA", AICAS 2021: orders of loop prime factors, each memory filled as far as it lowers the transfers
  above it. Gilbert et al., "LoopTree", 2024: nests in which each operand is kept at a place of its own.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from codesign.hw.loop_nests import COLS, INNER, ROWS, UNUSED, Cuts, Floats, Mask, Nests, Operand

MAX_FACTORS = 6
"""Loops of an order; all orders are tried."""


def prime_factors(number: int) -> list[int]:
    """Returns the prime factors of a positive number, rising."""
    found = []
    for prime in itertools.chain([2], range(3, math.isqrt(number) + 1, 2)):
        while number % prime == 0:
            found.append(prime)
            number //= prime
    return [*found, number] if number > 1 else found


def limited_factors(rounds: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Returns at most `MAX_FACTORS` loops (dimension, rounds).

    They are prime factors, the smallest two merged while there are too many: those of the dimension with the most loops,
    the first of equals.

    Args:
      rounds: Rounds of the dimensions M, N, K.
    """
    factors = [prime_factors(number) for number in rounds]
    while sum(map(len, factors)) > MAX_FACTORS:
        most = max(factors, key=len)
        most[:2] = [most[0] * most[1]]
        most.sort()
    return [(dim, factor) for dim, found in enumerate(factors) for factor in found]


def all_orders(rounds: NDArray[np.int_]) -> tuple[Nests, NDArray[np.int_]]:
    """Returns every order of the loops of each product, `[P, 6]`, and the product of each, `[P]`.

    Args:
      rounds: Rounds of the dimensions, `[R, 3]`.
    """
    orders = [
        sorted(set(itertools.permutations(limited_factors((rows, cols, inner)))))
        for rows, cols, inner in rounds.tolist()
    ]
    counts = [len(found) for found in orders]
    loops = np.full((sum(counts), MAX_FACTORS, 2), (UNUSED, 1))
    for start, found in zip(np.cumsum(counts) - counts, orders, strict=True):
        loops[start : start + len(found), : len(found[0])] = np.reshape(
            found, (len(found), len(found[0]), 2)
        )
    nests = Nests(dims=loops[..., 0], rounds=loops[..., 1].astype(np.float64))
    return nests, np.repeat(np.arange(len(rounds)), counts)


def best_cuts(
    nests: Nests, starts: dict[Operand, Cuts], bits: dict[Operand, Floats], capacity_bits: float
) -> tuple[dict[Operand, Cuts], Mask]:
    """Returns where a memory's operands are cut so that the fewest bits cross its upper side, and whether any cut fits.

    Of equals the last is taken, the last operand's cut moving first.

    Args:
      nests: The nests, `[P, L]`.
      starts: Cut of each operand in the memory below, `[P]`, in the memory's order of operands.
      bits: Bits of each operand inside each cut, `[P, L + 1]`.
      capacity_bits: What the memory holds.
    """
    cycles = nests.cycles()
    places = np.arange(cycles.shape[-1])
    total = np.zeros((len(cycles), *[1] * len(starts)))
    moved = total
    fits = np.ones_like(total, bool)
    for axis, (operand, start) in enumerate(starts.items()):
        shape = [len(cycles), *[1] * len(starts)]
        shape[axis + 1] = len(places)
        size = bits[operand]
        total = total + np.reshape(size, shape)
        moved = moved + np.reshape(cycles[:, -1:] / cycles * size, shape)
        fits = fits & np.reshape(places >= start[:, None], shape)
    fits = fits & (total <= capacity_bits)
    moved = np.where(fits, moved, np.inf)
    grid = moved.shape[1:]
    flat = np.reshape(moved, (len(cycles), -1))
    best = flat.shape[1] - 1 - np.argmin(flat[:, ::-1], axis=1)
    cuts = np.unravel_index(best, grid)
    return dict(zip(starts, cuts, strict=True)), np.isfinite(np.min(flat, axis=1))


def divisors(number: int) -> NDArray[np.int_]:
    """Returns the divisors of a positive number, rising."""
    candidates = np.arange(1, number + 1)
    return np.asarray(candidates[number % candidates == 0])


def tiled_nests(rounds: NDArray[np.int_]) -> tuple[Nests, dict[Operand, Cuts], NDArray[np.int_]]:
    """Returns exact tilings of each product, weights stationary over the rows of a tile.

    Either the input or the output is kept further out. Both are tiled along the rows, and the inner one again; the outer
    one is also tiled along the dimension that the inner one lacks, which then moves once per round of it. Any other loop
    would move more and hold no less.

    Args:
      rounds: Rounds of the dimensions, `[R, 3]`.

    Returns:
      Nests of all products, `[C, 6]`; where weights, inputs and outputs are kept, `[C]`; the product of each, `[C]`.
    """
    found = []
    for row, (rows, cols, inner) in enumerate(rounds.tolist()):
        of_rows = divisors(rows)
        outer_rows, mid_rows = (side.ravel() for side in np.meshgrid(of_rows, of_rows))
        exact = rows % (outer_rows * mid_rows) == 0
        outer_rows, mid_rows = outer_rows[exact], mid_rows[exact]
        for is_output_outside, own, other in ((False, inner, cols), (True, cols, inner)):
            tiles = divisors(own)
            # [tiles of rows, tiles of the dimension that the other operand lacks]
            shape = (len(outer_rows), len(tiles))
            loops = [
                (rows // (outer_rows * mid_rows))[:, None],
                (own // tiles)[None],
                np.array([[other]]),
                mid_rows[:, None],
                tiles[None],
                outer_rows[:, None],
            ]
            flat = [np.broadcast_to(loop, shape).ravel() for loop in loops]
            dims = (
                [ROWS, COLS, INNER, ROWS, COLS, ROWS]
                if is_output_outside
                else [ROWS, INNER, COLS, ROWS, INNER, ROWS]
            )
            count = math.prod(shape)
            found.append(
                (
                    np.stack(flat, axis=-1),
                    np.tile(dims, (count, 1)),
                    np.full(count, 2 if is_output_outside else 4),
                    np.full(count, row),
                )
            )
    rounds_, dims_, input_cut, rows_ = (np.concatenate(parts) for parts in zip(*found, strict=True))
    nests = Nests(dims=np.where(rounds_ == 1, UNUSED, dims_), rounds=rounds_.astype(np.float64))
    cuts: dict[Operand, Cuts] = {
        "weight": np.ones_like(input_cut),
        "input": input_cut,
        "output": 6 - input_cut,
    }
    return nests, cuts, rows_
