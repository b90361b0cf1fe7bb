"""Issue of tile operations in AccelTran's cycle-level simulator: groups, pools of units, who waits for what.

References:
  Tuli, Jha, "AccelTran", arXiv 2302.14705; simulator of the repository jha-lab/acceltran.
"""

import heapq
import itertools
from dataclasses import dataclass, field

from codesign.errors import CodesignError
from codesign.hw.acceltran_program import Kind, Stream

NEVER = 2**62
"""A cycle that does not come."""


@dataclass(kw_only=True)
class Pool:
    """Units of one kind.

    Attributes:
      size: How many can be taken, one by each tile operation.
      width: Units behind each; a softmax operation takes all of a processing element.
      free: How many are free now.
      busy: Unit-cycles paid for so far.
    """

    size: int
    width: int = 1
    free: int = field(init=False)
    busy: int = 0
    _releases: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Starts with all units free."""
        self.free = self.size

    def advance(self, now: int) -> None:
        """Frees what is released up to a cycle."""
        releases = self._releases
        while releases and releases[0][0] <= now:
            self.free += heapq.heappop(releases)[1]

    def has_free(self, count: int) -> bool:
        """Returns whether a group may start: as many units as it has operations, by the simulator's own count.

        Raises:
          CodesignError: If units are enough, but not the processing elements that softmax operations take.
        """
        if self.free * self.width < count:
            return False
        if self.free < count:
            raise CodesignError(
                f"{count} softmax operations need a processing element each and {self.free} are free, where "
                "AccelTran's simulator stops too: make the issue group a divisor of the processing elements"
            )
        return True

    def take(self, count: int, service: int, now: int) -> None:
        """Occupies units; each is held one cycle longer than its service, and paid for the service."""
        self.free -= count
        self.busy += count * self.width * service
        heapq.heappush(self._releases, (now + service + 1, count))

    def next_release(self) -> int:
        """Returns the next cycle in which units become free."""
        return self._releases[0][0] if self._releases else NEVER

    def last_release(self) -> int:
        """Returns the cycle from which all units are free."""
        return max(self._releases)[0] if self._releases else 0

    def stop(self, end: int) -> None:
        """Takes back what would be paid after the last cycle."""
        for release, count in self._releases:
            self.busy -= count * self.width * max(0, release - 1 - end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tile operations that start together.

    Attributes:
      kind: Their kind.
      count: How many.
      service: Cycles of each.
      needs: Data that all of them need.
      pieces: For each operation that has a part in it: its index, and where the part starts and stops along the stream.
    """

    kind: Kind
    count: int
    service: int
    needs: tuple[str, ...]
    pieces: tuple[tuple[int, int, int], ...]


class Pointer:
    """Where a stream's issue stands.

    Attributes:
      group: What is issued next; None at the end.
      done_at: Of each operation, the cycle from which its last tile operation is done.
      issued_at: The cycle of the last issue.
      issued: The group of it.
      is_broken: Whether tile operations have been passed over.
      ready_at: The cycle from which the data of `group` can be read, as of so many `changes` of the buffers.
    """

    def __init__(self, stream: Stream, *, size: int, is_head: bool, is_last: bool = False) -> None:
        """Starts a stream.

        Args:
          stream: Its tile operations.
          size: Group size B. Outside heads a group of B > 1 has one operation more, and the pointer moves by B all
            the same.
          is_head: Whether this is a head.
          is_last: Whether the program ends with it: then its last tile operation is issued once more.
        """
        self._operations = stream.operations
        self._ends = list(itertools.accumulate(one.count for one in stream.operations))
        self._size = size
        self._is_head = is_head
        self._is_last = is_last
        self._position = 0
        self._index = 0
        self.done_at = [NEVER] * len(stream.operations)
        self.issued_at = -1
        self.issued: Group | None = None
        self.is_broken = False
        self.changes = -1
        self.ready_at = NEVER
        self.group: Group | None = self._next_group()

    def _next_group(self) -> Group:
        while self._ends[self._index] <= self._position:
            self._index += 1
        start, index = self._position, self._index
        first = self._operations[index]
        extra = 0 if self._is_head or self._size == 1 else 1
        stop = min(start + self._size + extra, self._ends[-1])
        pieces = []
        needs: tuple[str, ...] = ()
        while start < stop:
            operation, end = self._operations[index], min(stop, self._ends[index])
            if operation.kind == first.kind:
                pieces.append((index, start, end))
                needs += operation.needs
            elif not self._is_head:
                break
            start, index = end, index + 1
        return Group(
            kind=first.kind,
            count=sum(end - start for _, start, end in pieces),
            service=first.service,
            needs=needs,
            pieces=tuple(pieces),
        )

    def issue(self, now: int) -> tuple[list[str], bool]:
        """Moves on from the group that starts now.

        Returns:
          Data of the operations whose first tile operation is in it, and whether the last of one is.
        """
        group = self.group
        assert group is not None
        self.issued, self.issued_at = group, now
        begun: list[str] = []
        has_ended = False
        for index, start, end in group.pieces:
            if start == self._ends[index] - self._operations[index].count:
                begun += self._operations[index].needs
            if end == self._ends[index] and self.done_at[index] == NEVER:
                self.done_at[index] = now + group.service + 1
                has_ended = True
        total, step = self._ends[-1], self._position + self._size
        if self._is_head:
            self._position = step if self._position < total - self._size else total
        elif self._is_last and self._position < total - 1:
            self._position = min(step, total - 1)
        else:
            self._position = min(step, total)
        contiguous = group.pieces[0][1] + group.count
        if self._position > contiguous:
            self.is_broken = True
        if self._position >= total:
            self.group = None
        else:
            self.group = self._next_group()
            if self.group.needs != group.needs:
                self.changes = -1
        return begun, has_ended
