"""AccelTran's own cycle-level simulator, slips included: cycles and busy times of a batch; no JAX.

Time jumps from event to event: the issue of a group of tile operations, the end of a transfer, the release of units.
Within a cycle the order is transfers, issue, units, buffers, as there. docs/validation.md lists the slips.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from codesign.errors import CodesignError, PresetError
from codesign.hw.acceltran_estimator import Layer, Machine
from codesign.hw.acceltran_issue import NEVER, Pointer, Pool
from codesign.hw.acceltran_program import Kind, Program, lower
from codesign.hw.acceltran_transfers import Transfers

POOLS: dict[Kind, str] = {
    "product": "lane",
    "convolution": "lane",
    "nonlinearity": "lane",
    "softmax": "softmax",
    "norm": "norm",
}
"""Which units run a tile operation."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """What a batch took.

    Attributes:
      cycles: From the embedding's load to the last tile operation.
      busy_cycles: Unit-cycles that are paid for, by kind of unit (lane, softmax, norm).
      transfer_cycles: Cycles in which a buffer transfers, by buffer (weight, activation, mask).
      loaded: Elements loaded into the weight buffer.
      stored: Elements stored into the activation buffer.
      peak_use: Largest fraction of a buffer in use, by buffer.
    """

    cycles: int
    busy_cycles: dict[str, int]
    transfer_cycles: dict[str, int]
    loaded: int
    stored: int
    peak_use: dict[str, float]


def simulate(
    layers: Sequence[Layer],
    machine: Machine,
    *,
    num_tokens: int,
    activation_sparsity: float,
    weight_sparsity: float,
    word_bits: float | None = None,
) -> Activity:
    """Returns what a batch takes in AccelTran's cycle-level simulator.

    Args:
      layers: The encoder, every layer with at least two heads.
      machine: The machine and its constants.
      num_tokens: Tokens of an example, >= 1.
      activation_sparsity: Fraction of zeros in activations, in [0, 1).
      weight_sparsity: Fraction of zeros in weights, in [0, 1).
      word_bits: Width of a word, bit; default: the machine's.

    Raises:
      PresetError: If the machine has no issue group.
      CodesignError: If the simulator cannot run it: data larger than their buffer, a wait without end.
    """
    if machine.issue_group is None:
        raise PresetError(
            f"{machine.spec.name}: AccelTran's simulator needs `estimator.issue_group`: add it, or use the preset "
            "`acceltran-edge`"
        )
    for name, value in (
        ("activation_sparsity", activation_sparsity),
        ("weight_sparsity", weight_sparsity),
    ):
        if not 0.0 <= value < 1.0:
            raise CodesignError(f"`{name}` must lie in [0, 1), got {value:g}: correct it")
    word = machine.constants.word.value if word_bits is None else word_bits
    program = lower(layers, machine, num_tokens=num_tokens, activation_sparsity=activation_sparsity)
    return _Simulation(
        program,
        machine,
        issue_group=machine.issue_group,
        activation_bits=word * (1.0 - activation_sparsity),
        weight_bits=word * (1.0 - weight_sparsity),
    ).run()


class _Simulation:
    """State of one run."""

    def __init__(
        self,
        program: Program,
        machine: Machine,
        *,
        issue_group: int,
        activation_bits: float,
        weight_bits: float,
    ) -> None:
        last = len(program.blocks) - 1
        self.blocks = [
            [
                Pointer(
                    stream,
                    size=issue_group,
                    is_head=len(block) > 1,
                    is_last=index == last,
                )
                for stream in block
            ]
            for index, block in enumerate(program.blocks)
        ]
        self.transfers = Transfers(
            program,
            machine,
            self.blocks,
            activation_bits=activation_bits,
            weight_bits=weight_bits,
        )
        elements = machine.processing_elements
        self.pools = {
            "lane": Pool(size=elements * machine.lanes),
            "softmax": Pool(size=elements, width=machine.softmax_units),
            "norm": Pool(size=elements),
        }
        self.end = NEVER
        self.current = 0  # the block at issue
        self.current_since = 0
        self.last_issue = -1
        self.rest_done_at = 0  # when all operations outside heads so far are done
        self.is_rest_broken = False
        self._want(self.blocks[0], 0)

    def run(self) -> Activity:
        """Runs the program to the end of its last tile operation."""
        transfers, pools = self.transfers, list(self.pools.values())
        now = 0
        while now < self.end:
            for pool in pools:
                pool.advance(now)
            has_started = now >= transfers.next_at and transfers.start(
                now, functools.partial(self._recent, now)
            )
            has_issued = self._issue(now)
            now = now + 1 if has_started or has_issued else self._next_event(now)
        for pool in pools:
            pool.stop(self.end)
        buffers = transfers.buffers
        return Activity(
            cycles=self.end,
            busy_cycles={name: pool.busy for name, pool in self.pools.items()},
            transfer_cycles={name: one.transfer_cycles for name, one in buffers.items()},
            loaded=transfers.loaded,
            stored=transfers.stored,
            peak_use={name: one.peak / one.capacity for name, one in buffers.items()},
        )

    def _issue(self, now: int) -> bool:
        """Issues the groups that can start, one of each stream, and returns whether one did."""
        if self.current == len(self.blocks):
            return False
        block = self.blocks[self.current]
        has_issued = False
        for pointer in block:
            group = pointer.group
            if group is None or self._ready_at(pointer) > now:
                continue
            pool = self.pools[POOLS[group.kind]]
            if pool.has_free(group.count):
                pool.take(group.count, group.service, now)
                self._advance(pointer, now)
                has_issued = True
        if not has_issued:
            return False
        self.last_issue = now
        if all(pointer.group is None for pointer in block):
            self.current += 1
            self.current_since = now + 1
            if self.current < len(self.blocks):
                self._want(self.blocks[self.current], now + 1)
        return True

    def _ready_at(self, pointer: Pointer) -> int:
        """Returns the cycle from which a stream's next group has all its data in buffers."""
        if pointer.changes != self.transfers.changes:
            assert pointer.group is not None
            pointer.changes = self.transfers.changes
            pointer.ready_at = max(
                (self.transfers.available_at(name) for name in pointer.group.needs), default=0
            )
        return pointer.ready_at

    def _advance(self, pointer: Pointer, now: int) -> None:
        """Moves a stream on, and notes what its group means to stores and to data."""
        group = pointer.group
        assert group is not None
        # The search for operations that are done ends at the first that was passed over.
        is_found = not (pointer.is_broken or self.is_rest_broken)
        begun, has_ended = pointer.issue(now)
        done = now + group.service + 1
        if has_ended:
            self.transfers.next_at = min(self.transfers.next_at, done)
        if self.current == len(self.blocks) - 1:
            self.end = pointer.done_at[-1]
        done = max(done, self.rest_done_at)
        if is_found:
            self.transfers.release(begun, done)
        if len(self.blocks[self.current]) == 1:
            self.rest_done_at = done
            self.is_rest_broken |= pointer.is_broken
        if pointer.group is not None and pointer.group.needs != group.needs:
            self._want([pointer], now + 1)

    def _want(self, pointers: Sequence[Pointer], at: int) -> None:
        for pointer in pointers:
            if pointer.group is not None:
                self.transfers.want(pointer.group.needs, at)

    def _recent(self, now: int) -> set[str]:
        """Returns the data of the groups that stood at issue in the cycle before."""
        index = self.current - 1 if self.current_since == now else self.current
        pointers = self.blocks[index] if 0 <= index < len(self.blocks) else []
        groups = [one.issued if one.issued_at == now - 1 else one.group for one in pointers]
        return {name for group in groups if group is not None for name in group.needs}

    def _next_event(self, now: int) -> int:
        """Returns the cycle to go on with when everything waits.

        Once no unit is busy, time jumps by what is left of the shortest transfer that is under way, past one that ends
        just then: a slip kept.

        Raises:
          CodesignError: If nothing is under way at all.
        """
        pools = self.pools.values()
        ends = [one.free_at for one in self.transfers.buffers.values() if one.free_at > now]
        event = min([*ends, *(pool.next_release() for pool in pools)])
        if self.transfers.next_at == now and self.last_issue >= now - 1:
            event = now + 1  # what may be evicted changes a cycle after an issue
        if not self.transfers.is_over:
            idle = max(now + 1, *(pool.last_release() for pool in pools))
            while idle <= event and any(end > idle for end in ends):
                left = min(end - idle for end in ends if end > idle)
                if left > 1:
                    return idle + left
                idle += 1
        if event == NEVER:
            raise CodesignError(
                f"nothing goes on from cycle {now:,}, {self._waiting()}: AccelTran's simulator never ends here; "
                "take larger buffers, or sizes whose tile operations are multiples of the issue group"
            )
        return event

    def _waiting(self) -> str:
        """Says what the first stream that is not over waits for."""
        pointers = self.blocks[self.current] if self.current < len(self.blocks) else []
        for group in (one.group for one in pointers):
            if group is not None:
                missing = [
                    name for name in group.needs if self.transfers.available_at(name) == NEVER
                ]
                what = f"`{missing[0]}`" if missing else f"free units for {group.count}"
                return f"tile operations of kind `{group.kind}` wait for {what}"
        return "stores wait for tile operations that were passed over"
