"""What a leader knows of one follower, and what it may send it next (the idea: etcd-io/raft's ``tracker/progress.go``).

::

    probe ──(a match is acknowledged)──> replicate ──(refused, or silent too long)──> probe
      └────────────── behind the log ──> snapshot ──(installed)──> replicate

*probe*: one message at a time, to find where the logs agree. *replicate*: up to `PIPELINE` batches under way.
*snapshot*: nothing but heartbeats until the snapshot is installed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from p2p.ids import Index, VoterId
from p2p.journal.log import NOTHING

PIPELINE = 4
BATCH_ENTRIES = 256
BATCH_BYTES = 1 << 20
ANSWERS = 200  # some twenty seconds of heartbeats
PROBE, REPLICATE, SNAPSHOT = "probe", "replicate", "snapshot"


@dataclass(slots=True, kw_only=True)
class Progress:
    """`match`: known to be on its disk. `next`: the next entry to send. Times are the leader's clock, seconds."""

    voter: VoterId
    next: Index
    contact: float  # when the newest message that it has answered was sent
    steady_since: float  # well and in contact without a break since then
    match: Index = NOTHING
    state: str = PROBE
    acked_round: int = 0
    match_round: int = 0  # whatever was sent in a later round was sent when `match` was known
    under_way: deque[Index] = field(default_factory=deque)  # the last entry of each batch sent and not acknowledged
    sent_at: float = float("-inf")  # when the oldest batch under way was sent, or the last acknowledgement came
    fetching: bool = False
    offered: Index = NOTHING
    offered_at: float = float("-inf")
    answers: deque[float] = field(default_factory=lambda: deque(maxlen=ANSWERS))  # how long the newest ones took
    priority: int = 0
    ready: bool = False
    refused_round: int = 0  # refusals of what was sent up to this round tell nothing that is not known
    regressed: bool = False  # it has lost what it had acknowledged: it must be replaced (PROTOCOL §2.10)
    agrees: bool | None = None  # whether the same entries did the same there (PROTOCOL §2.23); None: not compared yet
    leaving_at: float | None = None  # it was removed; it is told so until then
    round_target: Index = NOTHING  # catching up is measured in rounds (Ongaro §4.2.1)
    round_began: float = 0.0
    round_seconds: float = float("inf")  # how long the last round of catching up took

    def slowness(self) -> float | None:
        """The 99th percentile of how long its answers took, seconds; None before there are enough to tell."""
        if len(self.answers) < ANSWERS // 4:
            return None
        return sorted(self.answers)[int(len(self.answers) * 0.99) - 1]

    def may_send(self) -> bool:
        """Whether one more batch may go out."""
        if self.fetching or self.regressed:
            return False
        if self.state == REPLICATE:
            return len(self.under_way) < PIPELINE
        return self.state == PROBE and not self.under_way

    def sent(self, last: Index, now: float) -> None:
        """A batch that ends with `last` went out."""
        if not self.under_way:
            self.sent_at = now
        self.under_way.append(last)
        if self.state == REPLICATE:
            self.next = Index(last + 1)

    def matched(self, match: Index, now: float, round_now: int) -> None:
        """It holds everything up to `match` on its disk."""
        if match > self.match:
            self.match = match
            self.match_round = round_now
            self.sent_at = now
            self.next = max(self.next, Index(match + 1))
        if self.state == PROBE and match < (self.under_way[0] if self.under_way else self.next - 1):
            return  # a heartbeat's answer; the probe, under way or still to be sent, tells more
        while self.under_way and self.under_way[0] <= match:
            self.under_way.popleft()
        if self.state != SNAPSHOT or match >= self.offered:
            if self.state != REPLICATE:
                self.under_way.clear()
                self.next = Index(self.match + 1)
            self.state = REPLICATE

    def lost(self) -> None:
        """What was under way has probably not arrived; that tells nothing about where the logs agree."""
        self.probe_from(self.next if self.state == PROBE else Index(self.match + 1))

    def probe_from(self, next_index: Index) -> None:
        """Look for where the logs agree, from `next_index` on."""
        self.state = PROBE
        self.fetching = False
        self.under_way.clear()
        self.next = max(next_index, Index(self.match + 1))
