"""``p2pctl recover``: a cluster that lost its majority for good goes on as a new one, of the one voter that is left.

Raft cannot know that a silent majority will never come back, so this is a person's decision, and it can lose what was
acknowledged: whatever had not reached this disk. The new cluster has another id and this store another disk id, so that
no lost voter, should it come back after all, can be taken for one of this cluster's, or this one for one of theirs.

Works on the directory of a stopped node, whose lock it holds. Looks first, says what may be lost, changes nothing until
told to; `p2p.storage.LogStore.recover` is what is done then.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import apsw

from coordination import commands
from p2p.cli import show
from p2p.cli.client import Failed, Usage
from p2p.effects import Config
from p2p.ids import Index, NodeId, node_of
from p2p.journal import snapshot
from p2p.storage import StorageError, lock
from p2p.storage.disk import DiskLog
from p2p.storage.glance import Glance, glance
from p2p.storage.identity import new_cluster_id

FLAG = "--i-accept-data-loss"
WISH = "voter.wish"  # see `p2p.cluster`

Told = dict[str, Any]


def recover(folder: Path, *, node: str | None, accepted: bool) -> Told:
    """What was found, and if it was `accepted`, what was done. Raises Usage or Failed; then nothing was changed."""
    if not (folder / "raft.db").is_file():
        raise Usage(f"--data-dir: there is no journal in {folder}", "it is the folder with raft.db, data/<node-id>")
    held = lock.take(folder)
    if held is None:
        raise Failed(
            f"a node runs on {folder} (process {lock.holder(folder)}): a running node is not recovered",
            "stop it first: pkill -f '[p]2p_orchestrator'",
        )
    with held:
        try:
            seen = glance(folder / "raft.db")
            _check(seen, folder, node)
            told = _describe(seen, folder)
            return told | _carry_out(seen, folder, told["applied"]) if accepted else told
        except (StorageError, snapshot.SnapshotError) as error:
            raise Failed(str(error), "nothing was changed") from None


def _check(seen: Glance, folder: Path, node: str | None) -> None:
    mine = seen.identity
    if node is not None and node != mine.node:
        raise Usage(f"--node-id: {folder} belongs to node {mine.node}, not to {node}")
    if not mine.cluster or not seen.last:
        raise Failed(
            f"{mine.node} holds no copy of the queue: there is nothing to recover here",
            "take the data directory of a node that was a voter",
        )
    if seen.config.voters == (mine.voter,):
        raise Failed(f"{mine.node} is the only voter of cluster {mine.cluster}: it needs nobody else", "start it")
    if snapshot.pending_install(folder / "snapshots") is not None:
        raise Failed(
            f"{mine.node} was ended in the middle of taking over a snapshot",
            "start the node once, stop it, and do this again",
        )


def _describe(seen: Glance, folder: Path) -> Told:
    mine = seen.identity
    applied = _applied(folder / "state.db")
    return {
        "node": mine.node,
        "old_cluster": mine.cluster,
        "others": sorted({str(node_of(voter)) for voter in seen.config.voters} - {str(mine.node)}),
        "last_index": seen.last,
        "last_term": seen.last_term,
        "committed_index": max(seen.acked_floor, applied),
        "applied": applied,
        "newest_command": _time_of(seen.newest),
        "done": False,
    }


def _applied(state: Path) -> int:
    """How far the queue beside the journal has come; 0 if it cannot be read: the node restores it."""
    if not state.exists():
        return 0
    try:
        db = apsw.Connection(str(state), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            row = db.execute("SELECT value FROM meta WHERE key = 'applied'").fetchone()
        finally:
            db.close()
    except apsw.Error:
        return 0
    return row[0] if row and isinstance(row[0], int) else 0


def _time_of(body: bytes | None) -> float | None:
    """Unix seconds."""
    try:
        return commands.decode(body).at_ms / 1000 if body else None
    except commands.UnknownCommand:
        return None


def _carry_out(seen: Glance, folder: Path, applied: int) -> Told:
    store = DiskLog(folder / "raft.db", NodeId(seen.identity.node), adopt=True)
    try:
        me = store.load(applied=Index(applied)).identity.voter
        cluster = new_cluster_id()
        store.recover(cluster, Config((me,)))
    finally:
        store.close()
    (folder / WISH).unlink(missing_ok=True)  # it votes now, whatever was once decided about it
    return {"done": True, "cluster": cluster}


def lines(told: Told) -> list[str]:
    """For a person."""
    node, others = told["node"], ", ".join(told["others"]) or "nobody else"
    committed, last = told["committed_index"], told["last_index"]
    newest = told["newest_command"]
    when = f"; the newest is {show.age(time.time() - newest)} ({show.clock(newest)})" if newest else ""
    found = [
        f"{node} holds entries up to {last} of term {told['last_term']} of cluster {told['old_cluster']}{when}.",
        f"Kept: up to {committed} for certain acknowledged"
        + (f"; {committed + 1} to {last} too, of which some may never have been" if last > committed else "")
        + ".",
        f"Lost: whatever {others} acknowledged behind entry {last}.",
        "Tokens (journal indexes) given out behind it will be given out again.",
    ]
    if not told["done"]:
        return [
            *found,
            "If another voter's disk is left, look at it too: the latest term wins, and in one term the highest entry.",
            f"Nothing was changed. To go on with {node} alone: add {FLAG}",
        ]
    return [
        *found,
        f"Done: {node} is the only voter of the new cluster {told['cluster']}. Start it as ever.",
        f"Never start {others} with the old journal: on each move raft.db*, state.db* and snapshots aside, then "
        f"start it with --peers and {node}'s address. It joins, and becomes a voter again.",
    ]
