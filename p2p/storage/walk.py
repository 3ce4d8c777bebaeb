"""One pass over a log: is every entry the one that was written, and what must the cores know about them?

Decides by PROTOCOL §2.20's rule (`p2p.storage.judge`) what is a torn end and what is damage. Shared by both stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from p2p.effects import CONFIG, Config, Entry
from p2p.ids import Index, Term
from p2p.storage import NOTHING_CHANGED, CorruptLog, judge, sums

Row = tuple[int, int, int, bytes, bytes, int]  # index, term, checksum, chain, body, kind; damage can make it anything


class Walked(NamedTuple):
    """What was found, without the torn end: that is the store's to cut off."""

    last: Index
    chain: bytes
    torn: int
    runs: tuple[tuple[Index, Term], ...]
    configs: tuple[tuple[Index, Config], ...]


def walk(rows: Iterable[Row], base: int, base_chain: bytes, end: int, floor: int) -> Walked:
    """`rows` are what is stored behind `base`, ascending, the last with index `end`. Raises CorruptLog."""
    running, expected, torn, run = base_chain, base + 1, 0, 0
    runs: list[tuple[Index, Term]] = []
    configs: list[tuple[Index, Config]] = []
    for index, term, crc, link, body, kind in rows:
        entry = Entry(Index(expected), Term(term), body, kind)
        try:
            crc_now, link_now = sums(running, entry)
            sound = link_now == link and crc_now == crc and index == expected
        except TypeError:  # a body that is no bytes, a term that is no number
            sound = False
        if not (sound and type(term) is int and type(kind) is int):
            judge(expected, end, floor)
            torn = 1
            break
        if term != run:
            runs.append((entry.index, entry.term))
            run = term
        if kind == CONFIG:
            configs.append((entry.index, _config(entry)))
        running, expected = link_now, expected + 1
    last = expected - 1
    if floor > last:
        judge(last + 1, floor, floor)
    return Walked(Index(last), running, torn, tuple(runs), tuple(configs))


def _config(entry: Entry) -> Config:
    try:
        return Config.decode(entry.body)
    except ValueError:
        raise CorruptLog(
            f"journal entry {entry.index} matches its checksum but is no configuration that this build reads. "
            f"{NOTHING_CHANGED}"
        ) from None
