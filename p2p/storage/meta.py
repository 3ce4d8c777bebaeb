"""The small table of ``raft.db``: whose store it is, its term and vote, where its log begins. Decides what its rows are
in each format, and what of them an older format or an adopted copy changes; `disk` reads and writes them.

Format 2 (this one) added an entry's kind, the term and configuration at the base, and the place of the file. A store of
format 1 was always a cluster of one voter, so that the rest can be told.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

from p2p.effects import Config, HardState
from p2p.ids import ClusterId, DiskId, NodeId, Term, VoterId, voter_id
from p2p.storage import CHAIN_BYTES, Identity, adopted_config
from p2p.storage.identity import Place, new_disk_id

FORMAT = 2
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE log (idx INTEGER PRIMARY KEY, term INTEGER NOT NULL, crc INTEGER NOT NULL, chain BLOB NOT NULL,
                  body BLOB NOT NULL, kind INTEGER NOT NULL DEFAULT 0);
"""
FROM_FORMAT_1 = "ALTER TABLE log ADD COLUMN kind INTEGER NOT NULL DEFAULT 0"
Meta = dict[str, Any]


def blank(node: NodeId, place: Place) -> Meta:
    """The rows of a new store, which belongs to no cluster."""
    return {
        "format": FORMAT, "cluster": "", "node": node, "disk": new_disk_id(), "term": 0, "voted_for": None,
        "acked_floor": 0, "base": 0, "base_term": 0, "base_chain": bytes(CHAIN_BYTES),
        "base_config": Config().encode(), **place._asdict(),
    }  # fmt: skip


def from_format_1(meta: Meta, place: Place) -> Meta:
    """What changes. The term of a compacted log's base was not kept: 0 says so."""
    alone = _voter(meta)
    return {
        "format": FORMAT,
        "voted_for": alone if meta["voted_for"] is not None else None,
        "base_term": 0,
        "base_config": Config(voters=(alone,)).encode(),
        **place._asdict(),
    }


def adopted(meta: Meta, place: Place, *, configs_in_log: bool) -> Meta:
    """What changes when a copy becomes a store of its own. A configuration in the log stays as it is, whatever it says:
    it is part of the log that the cluster agreed on."""
    old, disk = _voter(meta), new_disk_id()
    config = Config.decode(meta["base_config"])
    if not configs_in_log:
        config = adopted_config(config, old, voter_id(meta["node"], disk))
    return {"disk": disk, "base_config": config.encode(), **place._asdict()}


def made_at(meta: Meta) -> Place | None:
    """The place of the file when its identity was made; format 1 did not know it."""
    return Place(meta["machine"], meta["device"], meta["inode"]) if "inode" in meta else None


def identity(meta: Meta) -> Identity:
    return Identity(ClusterId(meta["cluster"]), NodeId(meta["node"]), DiskId(meta["disk"]))


def hard_state(meta: Meta) -> HardState:
    voted = meta["voted_for"]
    return HardState(Term(meta["term"]), VoterId(voted) if voted is not None else None)


def seal(meta: Meta) -> int:
    """A checksum of all rows: none of them changes behind our back."""
    return crc32(repr(sorted(meta.items())).encode())


def _voter(meta: Meta) -> VoterId:
    return identity(meta).voter
