"""A copy engine under the test's thumb: copies end late, torn, out of order, failed or twice over."""

from collections.abc import Sequence

from tidegate.engine.memory.copies import Completion, CopyOp

POISON = -1
"""What a position holds that nobody has written yet."""


class FakeTransfer:
    """Both tiers are lists of blocks, a block is a list of positions, and each position holds one number.

    Nothing moves by itself. Between ``submit`` and ``finish`` the content of a copy moves position by
    position whenever the test says so, and reads its source at that very moment: a slot that is reused
    too early, or written while it is read, shows in what arrives.
    """

    bytes_per_second = 1e9

    def __init__(self, device_blocks: int, host_blocks: int, block_size: int) -> None:
        self.device = [[POISON] * block_size for _ in range(device_blocks)]
        self.host = [[POISON] * block_size for _ in range(host_blocks)]
        self.under_way: dict[int, CopyOp] = {}
        self.ended: list[int] = []
        """Tickets that were reported at least once."""
        self._block_size = block_size
        self._moved: dict[int, int] = {}
        self._reports: list[Completion] = []

    @property
    def num_reports(self) -> int:
        """Reports that nobody has polled."""
        return len(self._reports)

    def submit(self, ops: Sequence[CopyOp]) -> None:
        for op in ops:
            self.under_way[op.ticket] = op
            self._moved[op.ticket] = 0

    def poll(self) -> list[Completion]:
        reports, self._reports = self._reports, []
        return reports

    def wait(self, timeout: float) -> None:
        """Nothing to wait for: what has not ended now waits for the test."""

    def close(self) -> None:
        self.under_way.clear()

    def advance(self, ticket: int, positions: int) -> None:
        """Move that many more positions of a copy under way."""
        op = self.under_way[ticket]
        device, host = self.device[op.device_index], self.host[op.host_index]
        source, target = (device, host) if op.to_host else (host, device)
        start = self._moved[ticket]
        end = min(start + positions, self._block_size)
        target[start:end] = source[start:end]
        self._moved[ticket] = end

    def finish(self, ticket: int, *, ok: bool) -> None:
        """End a copy. One that fails leaves its target as far as it got."""
        if ok:
            self.advance(ticket, self._block_size)
        del self.under_way[ticket], self._moved[ticket]
        self.ended.append(ticket)
        self._reports.append(Completion(ticket, ok))

    def report_again(self, ticket: int, *, ok: bool) -> None:
        """Report a copy that has ended before."""
        self._reports.append(Completion(ticket, ok))
