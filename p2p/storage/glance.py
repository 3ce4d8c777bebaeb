"""What a store says of itself, looked at without changing or verifying it: for a person who must decide what becomes of
it. A running node's own `load` decides what is true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import apsw

from p2p.effects import COMMAND, CONFIG, Config
from p2p.ids import Index, Term
from p2p.storage import Identity, StorageError, meta
from p2p.storage.identity import place_of

NEWEST = 1_000  # entries from the end in which a command is looked for


class Glance(NamedTuple):
    """`newest` holds the newest command in the log, None if there is none near its end. `config` is the newest
    configuration, committed or not."""

    identity: Identity
    copied: bool
    term: Term
    base: Index
    last: Index
    last_term: Term
    acked_floor: Index
    config: Config
    newest: bytes | None


def glance(path: Path) -> Glance:
    """Raises StorageError if there is no store that this build reads."""
    if not path.is_file():
        raise StorageError(f"there is no journal at {path}")
    try:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            return _read(db, path)
        finally:
            db.close()
    except (apsw.Error, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


def _read(db: apsw.Connection, path: Path) -> Glance:
    state: meta.Meta = {str(key): value for key, value in db.execute("SELECT key, value FROM meta")}
    if state["format"] != meta.FORMAT:
        raise StorageError(
            f"{path} has journal format {state['format']}, this build's is {meta.FORMAT}: start a node of this build "
            "on it once"
        )
    made = meta.made_at(state)
    last = cast(Any, db.execute("SELECT idx, term FROM log ORDER BY idx DESC LIMIT 1").fetchone())
    index, term = last or (state["base"], state["base_term"])
    config = cast(
        Any, db.execute("SELECT body FROM log WHERE kind = ? ORDER BY idx DESC LIMIT 1", (CONFIG,)).fetchone()
    )
    newest = cast(
        Any,
        db.execute(
            "SELECT body FROM log WHERE idx > ? AND kind = ? AND length(body) > 0 ORDER BY idx DESC LIMIT 1",
            (index - NEWEST, COMMAND),
        ).fetchone(),
    )
    return Glance(
        identity=meta.identity(state),
        copied=made is not None and place_of(path).is_copy_of(made),
        term=Term(state["term"]),
        base=Index(state["base"]),
        last=Index(index),
        last_term=Term(term),
        acked_floor=Index(state["acked_floor"]),
        config=Config.decode(config[0] if config else state["base_config"]),
        newest=newest[0] if newest else None,
    )
