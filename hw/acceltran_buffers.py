"""Buffers of AccelTran's cycle-level simulator: what they hold, what they evict, how long a transfer takes.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from codesign import units
from codesign.errors import CodesignError


@dataclass(kw_only=True)
class Buffer:
    """One buffer and its port; one transfer at a time.

    Attributes:
      name: For messages.
      capacity: Size, bit.
      element_bits: Width of a stored element, bit.
      load_bandwidth: Of main memory, bit/cycle.
      store_bandwidth: Of the buffer, bit/cycle.
      free_at: The cycle from which another transfer may start.
      used: Bits held, those arriving included.
      peak: The most of them so far.
      held: Elements by data, the oldest first.
      available: The cycle from which data can be read.
      transfer_cycles: Cycles of transfers so far.
    """

    name: str
    capacity: float
    element_bits: float
    load_bandwidth: float
    store_bandwidth: float
    free_at: int = 0
    used: float = 0.0
    peak: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    available: dict[str, int] = field(default_factory=dict)
    transfer_cycles: int = 0

    def has_room(self, data: str, elements: int, is_required: Callable[[str], bool]) -> bool:
        """Returns whether data may enter, if need be in place of what is not required.

        The second test compares with the data that came last, not with those that want to enter: a slip kept.

        Raises:
          CodesignError: If they are larger than the buffer.
        """
        wanted = elements * self.element_bits
        if self.capacity < wanted:
            raise CodesignError(
                f"`{data}` of {wanted / units.BITS_PER_BYTE:,.0f} bytes does not fit the {self.name} buffer of "
                f"{self.capacity / units.BITS_PER_BYTE:,.0f} bytes: enlarge it, or lower sizes or batch"
            )
        if self.capacity - self.used >= wanted:
            return True
        required = sum(size for data, size in self.held.items() if is_required(data))
        last = next(reversed(self.held.values()))
        return self.capacity - required * self.element_bits > last * self.element_bits

    def enter(
        self,
        data: str,
        elements: int,
        now: int,
        is_required: Callable[[str], bool],
        *,
        is_load: bool,
    ) -> int:
        """Starts a transfer and returns its cycles; 0 if the data are there.

        Raises:
          CodesignError: If there is no room even without what is not required.
        """
        if data in self.held:
            return 0
        wanted = elements * self.element_bits
        for old in list(self.held):
            if self.used + wanted <= self.capacity:
                break
            if not is_required(old):
                self.used -= self.held.pop(old) * self.element_bits
                del self.available[old]
        if self.used + wanted > self.capacity:
            raise CodesignError(
                f"the {self.name} buffer has no room for `{data}` beside what is in use, where AccelTran's "
                "simulator stops too: enlarge it"
            )
        cycles = math.ceil(wanted / (self.load_bandwidth if is_load else self.store_bandwidth))
        self.transfer_cycles += cycles
        self.used += wanted
        self.peak = max(self.peak, self.used)
        self.held[data] = elements
        self.available[data] = self.free_at = now + cycles
        return cycles
