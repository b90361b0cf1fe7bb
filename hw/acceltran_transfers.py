"""Transfers of AccelTran's cycle-level simulator: in which order data enter the buffers, and which may be evicted.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from codesign import units
from codesign.hw.acceltran_buffers import Buffer
from codesign.hw.acceltran_estimator import Machine
from codesign.hw.acceltran_issue import NEVER, Pointer
from codesign.hw.acceltran_program import EMBEDDING, Program, Transfer

MASK_BITS = 1.0
"""Width of a mask's element, bit."""


@dataclass(slots=True)
class _Datum:
    """From which cycle data are wanted, let go again, and can be read."""

    wanted_at: int = NEVER
    released_at: int = NEVER
    available_at: int = NEVER


class Transfers:
    """The transfers of a program, one block of streams after the other, and the buffers that they fill.

    Attributes:
      buffers: By role: weight, activation, mask.
      next_at: The cycle in which the next transfer may start; at `now` if one waits for room.
      changes: How often data have entered, so that others may have left.
      loaded: Elements loaded into the weight buffer.
      stored: Elements stored into the activation buffer.
    """

    def __init__(
        self,
        program: Program,
        machine: Machine,
        pointers: Sequence[Sequence[Pointer]],
        *,
        activation_bits: float,
        weight_bits: float,
    ) -> None:
        """Starts before the first transfer.

        Args:
          program: The encoder.
          machine: Sizes of the buffers and bandwidths.
          pointers: The issue of every stream of every block, which stores wait for.
          activation_bits: Width of a stored activation, zeros left out, bit.
          weight_bits: Width of a stored weight, zeros left out, bit.
        """
        self.buffers = {
            role: Buffer(
                name=role,
                capacity=machine.buffers[role][1] * units.BYTES_PER_MIB * units.BITS_PER_BYTE,
                element_bits=bits,
                load_bandwidth=machine.main_bandwidth,
                store_bandwidth=machine.constants.buffer_bandwidth.value,
            )
            for role, bits in (
                ("weight", weight_bits),
                ("activation", activation_bits),
                ("mask", MASK_BITS),
            )
        }
        self.next_at = 0
        self.changes = 0
        self.loaded = 0
        self.stored = 0
        self._pointers: list[Sequence[Pointer]] = [[], *pointers]
        self._blocks: list[list[tuple[Transfer, ...]]] = [
            [(program.embedding,)],
            *([stream.transfers for stream in block] for block in program.blocks),
        ]
        self._block = 0
        self._positions = [0]
        self._data: dict[str, _Datum] = {}

    @property
    def is_over(self) -> bool:
        """Whether the last transfer has started."""
        return self._block >= len(self._blocks)

    def start(self, now: int, recent: Callable[[], Collection[str]]) -> bool:
        """Starts the transfers that can start and returns whether one did; heads that lag behind come first.

        Args:
          now: The cycle.
          recent: Returns the data wanted by the groups that stood at issue in the cycle before.

        Raises:
          CodesignError: If data are larger than their buffer, or what is required leaves no room.
        """
        if self.is_over:
            return False
        streams, positions = self._blocks[self._block], self._positions
        waiting = [index for index, one in enumerate(streams) if positions[index] < len(one)]
        has_started = False
        wake = NEVER

        def is_required(data: str) -> bool:
            return self._is_required(data, now, recent)

        for index in sorted(waiting, key=positions.__getitem__):
            transfer = streams[index][positions[index]]
            buffers = (self.buffers[transfer.storage], self.buffers["mask"])
            ready = max(one.free_at for one in buffers)
            if transfer.producer is not None:
                ready = max(ready, self._pointers[self._block][index].done_at[transfer.producer])
            if ready > now:
                wake = min(wake, ready)
            elif not all(
                one.has_room(transfer.data, transfer.elements, is_required) for one in buffers
            ):
                wake = now
            else:
                cycles = [
                    one.enter(
                        transfer.data,
                        transfer.elements,
                        now,
                        is_required,
                        is_load=transfer.producer is None,
                    )
                    for one in buffers
                ]
                self._note(transfer, now, cycles)
                positions[index] += 1
                has_started = True
        if all(position == len(one) for position, one in zip(positions, streams, strict=True)):
            self._block += 1
            if not self.is_over:
                self._positions = [0] * len(self._blocks[self._block])
        self.next_at = now + 1 if has_started else wake
        return has_started

    def available_at(self, data: str) -> int:
        """Returns the cycle from which data can be read; masks are not waited for."""
        return min(
            self.buffers[role].available.get(data, NEVER) for role in ("activation", "weight")
        )

    def want(self, data: Collection[str], at: int) -> None:
        """Notes the first cycle in which a group that needs the data stands at issue."""
        for name in data:
            datum = self._data.setdefault(name, _Datum())
            datum.wanted_at = min(datum.wanted_at, at)

    def release(self, data: Collection[str], at: int) -> None:
        """Notes the cycle from which a tile operation that needs the data is done."""
        for name in data:
            self._data[name].released_at = min(self._data[name].released_at, at)

    def _note(self, transfer: Transfer, now: int, cycles: list[int]) -> None:
        self.changes += 1
        if not cycles[0]:
            return
        if transfer.producer is None:
            self.loaded += transfer.elements
        else:
            self.stored += transfer.elements
        datum = self._data.setdefault(transfer.data, _Datum())
        datum.available_at = now + min(cycles)

    def _is_required(self, data: str, now: int, recent: Callable[[], Collection[str]]) -> bool:
        """Returns whether data may not be evicted: the embedding, and what is wanted and not let go since."""
        if data == EMBEDDING:
            return True
        datum = self._data[data]
        if datum.available_at > now:
            return False
        return datum.wanted_at < now < datum.released_at or data in recent()
