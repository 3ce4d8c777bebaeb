"""What each order asks of a node. Answers plain data, the same that ``--json`` prints; `show` makes lines of it."""

from __future__ import annotations

import time
from typing import Any

from p2p.cli.client import Client, CliError, Failed

Told = dict[str, Any]


def voters(node: Client) -> Told:
    """``/admin/voters``, as the leader sees them."""
    return node.get("/admin/voters")


def add_voter(node: Client, name: str) -> Told:
    """Answers the voters then. Ends when it votes, which takes as long as it needs to catch up."""
    return node.post("/admin/voters/add", {"node": name})


def remove_voter(node: Client, name: str) -> Told:
    return node.post("/admin/voters/remove", {"node": name})


def leader(node: Client) -> Told:
    """``{"leader", "term", "since", "seconds"}``. Raises Failed if there is none, saying what the node asked knows."""
    try:
        told = node.get("/admin/voters")
    except Failed as error:
        if error.status != 503:
            raise
        known = node.get("/status?consistency=stale")
        why = known.get("not_ready") or str(error)
        raise Failed(
            f"there is no leader now: {known['node_id']} is in term {known['term']} ({why})", error.hint
        ) from None
    since = told.get("leader_since")
    return {
        "leader": told.get("leader"),
        "term": told["term"],
        "since": since,
        "seconds": round(max(time.time() - since, 0.0), 1) if since else None,
    }


def transfer(node: Client, to: str | None) -> Told:
    """``{"leader", "term"}`` of the new one."""
    return node.post("/admin/leadership/transfer", {"to": to} if to else {})


def status(node: Client) -> Told:
    """``{"asked", "leader", "term", "cluster", "nodes": [{node, role, state, lag, …}], …}``. Never needs a leader: then
    nothing is known of lags."""
    here = node.get("/status?consistency=stale")
    table: Told = {}
    if here.get("leader_id") is not None:
        try:
            table = node.get("/admin/voters")
        except CliError:
            pass  # its lags are not known, then
    rows = {row["node"]: row for key in ("voters", "learners") for row in table.get(key, ())}
    nodes = []
    for name, member in sorted((here.get("peers") or {}).items()):
        row = rows.get(name)
        nodes.append(
            {
                "node": name,
                "role": "learner" if name in (here.get("learners") or ()) else member["role"],
                "state": member["state"],
                "lag": _lag(table, row),
                "jobs": member["running_jobs"],
                "address": member["address"],
                "version": member["version"],
                "draining": bool(member.get("draining")),
            }
        )
    known = {row["node"] for row in nodes}
    for name, row in sorted(rows.items()):
        if name not in known:  # a voter that gossip has never heard of, or has forgotten
            nodes.append(
                {"node": name, "role": "voter", "state": row["state"], "lag": _lag(table, row), "jobs": None}
                | {"address": None, "version": None, "draining": False}
            )
    return {
        "asked": here["node_id"],
        "cluster": here.get("cluster_id"),
        "leader": here.get("leader_id"),
        "term": here["term"],
        "voters": here.get("voters") or [],
        "not_ready": here.get("not_ready"),
        "nodes": nodes,
    }


def _lag(table: Told, row: Told | None) -> int | None:
    """How many entries a copy lacks; None for a node without one, and where nobody can say."""
    if row is None:
        return None
    if row.get("leads"):
        return 0
    match = row.get("match_index")
    return max(int(table["last_index"]) - int(match), 0) if match is not None else None
