"""AccelTran's own cycle-level simulator, slips included: cycles and busy times of a batch; no JAX.

Time jumps from event to event: an issue of a group of tile operations, the end of a transfer, the release of units.
Within a cycle the order is memory, issue, units, buffers, as there. docs/validation.md lists the slips.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from codesign import units
from codesign.errors import CodesignError
from codesign.hw.acceltran_buffers import Buffer
from codesign.hw.acceltran_estimator import Layer, Machine
from codesign.hw.acceltran_issue import NEVER, Pointer, Pool
from codesign.hw.acceltran_program import EMBEDDING, Kind, Program, Transfer, lower

POOLS: dict[Kind, str] = {
    "product": "lane",
    "convolution": "lane",
    "nonlinearity": "lane",
    "softmax": "softmax",
    "norm": "norm",
}
"""Which units run a tile operation."""
MASK_BITS = 1.0
"""Width of a mask's element, bit."""


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


@dataclass(slots=True)
class _Datum:
    """When data are wanted first, when a user of them is done, and when they can be read."""

    wanted_at: int = NEVER
    released_at: int = NEVER
    available_at: int = NEVER


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
      CodesignError: If the simulator cannot run it: data larger than their buffer, a wait without end.
    """
    for name, value in (
        ("activation_sparsity", activation_sparsity),
        ("weight_sparsity", weight_sparsity),
    ):
        if not 0.0 <= value < 1.0:
            raise CodesignError(f"`{name}` must lie in [0, 1), got {value:g}: correct it")
    word = machine.constants.word.value if word_bits is None else word_bits
    program = lower(
        layers, machine, num_tokens=num_tokens, activation_sparsity=activation_sparsity
    )
    return _Simulation(
        program, machine, word * (1.0 - activation_sparsity), word * (1.0 - weight_sparsity)
    ).run()


class _Simulation:
    """State of one run; `now` is the cycle."""

    def __init__(
        self, program: Program, machine: Machine, activation_bits: float, weight_bits: float
    ) -> None:
        self.now = 0
        self.end = NEVER
        self.buffers = {
            name: Buffer(
                name=name,
                capacity=megabytes * units.BYTES_PER_MIB * units.BITS_PER_BYTE,
                element_bits=bits,
                load_bandwidth=machine.main_bandwidth,
                store_bandwidth=machine.constants.buffer_bandwidth.value,
            )
            for name, megabytes, bits in (
                ("weight", machine.weight_mb, weight_bits),
                ("activation", machine.activation_mb, activation_bits),
                ("mask", machine.mask_mb, MASK_BITS),
            )
        }
        elements = machine.processing_elements
        self.pools = {
            "lane": Pool(size=elements * machine.lanes),
            "softmax": Pool(size=elements, width=machine.softmax_units),
            "norm": Pool(size=elements),
        }
        last = len(program.blocks) - 1
        self.pointers = [
            [
                Pointer(
                    stream,
                    size=machine.issue_group,
                    is_head=len(block) > 1,
                    is_last=index == last,
                )
                for stream in block
            ]
            for index, block in enumerate(program.blocks)
        ]
        # Transfers go through the blocks on their own; the embedding's load stands before them.
        self.transfers: list[list[tuple[Transfer, ...]]] = [
            [(program.embedding,)],
            *([stream.transfers for stream in block] for block in program.blocks),
        ]
        self.memory_block = 0
        self.memory_positions = [0]
        self.memory_at = 0
        self.block = 0
        self.previous: list[Pointer] = []
        self.block_at = 0
        self.last_issue = -1
        self.epoch = 0
        self.rest_done_at = 0
        self.is_rest_broken = False
        self.data: dict[str, _Datum] = {EMBEDDING: _Datum()}
        self.loaded = 0
        self.stored = 0
        self._want(self.pointers[0], 0)

    def run(self) -> Activity:
        """Runs the program to its last tile operation."""
        pools = list(self.pools.values())
        while self.now < self.end:
            now = self.now
            for pool in pools:
                pool.advance(now)
            has_started = now >= self.memory_at and self._transfer(now)
            has_issued = self.block < len(self.pointers) and self._issue(now)
            self.now = now + 1 if has_started or has_issued else self._next_event(now)
        for pool in pools:
            pool.stop(self.end)
        return Activity(
            cycles=self.end,
            busy_cycles={name: pool.busy for name, pool in self.pools.items()},
            transfer_cycles={
                name: one.load_cycles + one.store_cycles for name, one in self.buffers.items()
            },
            loaded=self.loaded,
            stored=self.stored,
            peak_use={name: one.peak / one.capacity for name, one in self.buffers.items()},
        )

    def _transfer(self, now: int) -> bool:
        """Starts what transfers can start and returns whether one did; heads that lag behind go first."""
        if self.memory_block >= len(self.transfers):
            return False
        streams, positions = self.transfers[self.memory_block], self.memory_positions
        waiting = [index for index, one in enumerate(streams) if positions[index] < len(one)]
        has_started = False
        wake = NEVER
        for index in sorted(waiting, key=positions.__getitem__):
            transfer = streams[index][positions[index]]
            buffer, mask = self.buffers[transfer.storage], self.buffers["mask"]
            start = max(buffer.free_at, mask.free_at)
            if transfer.producer is not None:
                start = max(start, self.pointers[self.memory_block - 1][index].done_at[transfer.producer])
            if start > now:
                wake = min(wake, start)
                continue
            if not (
                buffer.has_room(transfer.elements, self._is_required)
                and mask.has_room(transfer.elements, self._is_required)
            ):
                wake = now
                continue
            self._start(transfer, now)
            positions[index] += 1
            has_started = True
        if not any(position < len(one) for position, one in zip(positions, streams, strict=True)):
            self.memory_block += 1
            if self.memory_block < len(self.transfers):
                self.memory_positions = [0] * len(self.transfers[self.memory_block])
        self.memory_at = now + 1 if has_started else wake
        return has_started

    def _start(self, transfer: Transfer, now: int) -> None:
        is_load = transfer.producer is None
        cycles = [
            self.buffers[name].enter(
                transfer.data, transfer.elements, now, self._is_required, is_load=is_load
            )
            for name in (transfer.storage, "mask")
        ]
        self.epoch += 1
        if not cycles[0]:
            return
        if is_load:
            self.loaded += transfer.elements
        else:
            self.stored += transfer.elements
        self.data.setdefault(transfer.data, _Datum()).available_at = now + min(cycles)

    def _issue(self, now: int) -> bool:
        """Issues the groups that can start, one of each stream, and returns whether one did."""
        block = self.pointers[self.block]
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
            self.previous, self.block_at = block, now + 1
            self.block += 1
            if self.block < len(self.pointers):
                self._want(self.pointers[self.block], now + 1)
        return True

    def _ready_at(self, pointer: Pointer) -> int:
        """Returns the cycle from which a stream's next group has all its data in buffers."""
        if pointer.epoch != self.epoch:
            assert pointer.group is not None
            pointer.epoch = self.epoch
            pointer.ready_at = max(
                (self._available_at(name) for name in pointer.group.needs), default=0
            )
        return pointer.ready_at

    def _available_at(self, name: str) -> int:
        return min(self.buffers[kind].available.get(name, NEVER) for kind in ("activation", "weight"))

    def _advance(self, pointer: Pointer, now: int) -> None:
        """Moves a stream on, and notes what its group means to stores and to data."""
        group = pointer.group
        assert group is not None
        is_scanned = not (pointer.is_broken or self.is_rest_broken)
        begun, has_ended = pointer.issue(now)
        done = now + group.service + 1
        if has_ended:
            self.memory_at = min(self.memory_at, done)
        if self.block == len(self.pointers) - 1:
            self.end = pointer.done_at[-1]
        done = max(done, self.rest_done_at)
        if is_scanned:
            for name in begun:
                self.data[name].released_at = min(self.data[name].released_at, done)
        if len(self.pointers[self.block]) == 1:
            self.rest_done_at = done
            self.is_rest_broken |= pointer.is_broken
        if pointer.group is not None and pointer.group.needs != group.needs:
            self._want([pointer], now + 1)

    def _want(self, pointers: Sequence[Pointer], at: int) -> None:
        """Notes from which cycle on data are wanted by the next groups."""
        for pointer in pointers:
            for name in pointer.group.needs if pointer.group else ():
                datum = self.data.setdefault(name, _Datum())
                datum.wanted_at = min(datum.wanted_at, at)

    def _is_required(self, name: str) -> bool:
        """Returns whether data may not be evicted: the embedding, and what is or was wanted and is not let go."""
        now, datum = self.now, self.data[name]
        if name == EMBEDDING:
            return True
        if datum.available_at > now:
            return False
        if datum.wanted_at < now < datum.released_at:
            return True
        pointers = self.previous
        if self.block_at != now:
            pointers = self.pointers[self.block] if self.block < len(self.pointers) else []
        groups = (one.issued if one.issued_at == now - 1 else one.group for one in pointers)
        return any(group is not None and name in group.needs for group in groups)

    def _next_event(self, now: int) -> int:
        """Returns the cycle to go on with when everything waits.

        If nothing but a transfer is under way, time jumps to the end of the first transfer that is not over, past
        what ended at that moment: a slip kept.

        Raises:
          CodesignError: If nothing is under way at all.
        """
        ends = [one.free_at for one in self.buffers.values() if one.free_at > now]
        event = min(ends + [pool.next_release() for pool in self.pools.values()])
        if self.memory_at == now and self.last_issue >= now - 1:
            event = now + 1
        if self.memory_block < len(self.transfers):
            idle = max(now + 1, *(pool.last_release() for pool in self.pools.values()))
            while idle <= event and any(end > idle for end in ends):
                left = min(end - idle for end in ends if end > idle)
                if left > 1:
                    return idle + left
                idle += 1
        if event == NEVER:
            raise CodesignError(
                f"nothing goes on from cycle {now:,}: {self._waiting()}; AccelTran's simulator never ends here; "
                "take larger buffers, or sizes whose tile operations are multiples of the issue group"
            )
        return min(event, self.end)

    def _waiting(self) -> str:
        """Says what the first stream that is not over waits for."""
        for pointer in self.pointers[self.block]:
            if pointer.group is not None:
                missing = [
                    name for name in pointer.group.needs if self._available_at(name) == NEVER
                ]
                return f"{pointer.group.count} operations `{pointer.group.kind}` wait for " + (
                    f"`{missing[0]}`" if missing else f"as many free units of `{POOLS[pointer.group.kind]}`"
                )
        return "a store waits for operations that were passed over"
