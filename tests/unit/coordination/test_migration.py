"""A queue of an earlier build is taken over as it lies on disk, and is then like one that this build has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import pytest

from config.settings import ROOT
from coordination.errors import Refused
from coordination.queue_reads import QueueReader
from coordination.queue_state import SCHEMA_VERSION, QueueState
from coordination.sql import migrations
from tests.unit.coordination.drive import T0, Queue, connection, dump

DATA = ROOT / "tests/data"
JOB = (
    "INSERT INTO jobs (seq, id, kind, grp, state, priority, shape, max_attempts, backoff_ms, timeout_ms, moves,"
    " created_ms, spec) VALUES (1, 'a', 'command', 'default', 'pending', 50, 1, 3, 0, 0, 1, ?, ?)"
)


def old_file(folder: Path, version: int = 1) -> Path:
    """A queue as the first build left it, with one pending job."""
    path = folder / "state.db"
    db = apsw.Connection(str(path))
    db.execute((DATA / f"queue_schema_{version}.sql").read_text())
    db.execute("INSERT INTO meta VALUES ('schema', ?), ('applied', 0), ('term', 0), ('now', ?), ('seq', 1)", (1, T0))
    db.execute("INSERT INTO shapes VALUES (1, '{\"cpus\":1.0}', 1)")
    db.execute(JOB, (T0, b'{"command":["true"]}'))
    db.execute("INSERT INTO history VALUES (1, 1, ?, 'pending', 0, NULL, NULL)", (T0,))
    db.execute("INSERT INTO counts VALUES ('pending', 'command', 'default', 1)")
    db.execute("INSERT INTO shape_counts VALUES (1, 1)")
    db.close()
    return path


def layout(db: apsw.Connection) -> dict[str, list[Any]]:
    """What there is: columns with their types and defaults, and the indexes."""
    tables = [str(name) for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: db.execute(f"SELECT * FROM pragma_table_info('{name}')").fetchall() for name in tables}
    found["indexes"] = sorted(db.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall())
    return found


def test_every_version_has_a_step_that_leads_to_it() -> None:
    assert set(migrations()) == set(range(2, SCHEMA_VERSION + 1))


def test_migrated_file_is_laid_out_like_a_new_one(tmp_path: Path) -> None:
    migrated, new = QueueState(str(old_file(tmp_path))), QueueState(":memory:")
    assert layout(connection(migrated)) == layout(connection(new))


def test_work_of_an_old_file_goes_on(tmp_path: Path) -> None:
    queue = Queue(str(old_file(tmp_path)))
    assert queue.state.pending_total == queue.state.unfinished_total == 1
    (claimed,) = queue.claim("a")
    assert (claimed.requires, claimed.checkpoint) == ('{"cpus":1.0}', None)
    queue.finish("a", ok=False, checkpoint=b'{"step":1}')
    (again,) = queue.claim("a")
    assert (again.requires, again.checkpoint) == ('{"avoid":["w1"],"cpus":1.0}', b'{"step":1}')
    queue.finish("a", attempt=2)
    record = QueueReader(str(tmp_path / "state.db")).job("a")
    assert record is not None
    assert (record["state"], record["requires"], record["no_retry_exit_codes"]) == ("completed", {"cpus": 1.0}, [])


def test_second_opening_finds_nothing_to_do(tmp_path: Path) -> None:
    path = str(old_file(tmp_path))
    first = QueueState(path)
    rows = dump(first)
    first.close()
    again = QueueState(path)
    assert dump(again) == rows
    assert ("schema", SCHEMA_VERSION) in rows["meta"]


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_file_of_another_build_is_refused_and_left_as_it_is(tmp_path: Path, version: int) -> None:
    path = old_file(tmp_path)
    db = apsw.Connection(str(path))
    db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (version,))
    before = layout(db)
    with pytest.raises(Refused, match=f"has queue schema {version}; this build reads {SCHEMA_VERSION}"):
        QueueState(str(path))
    assert layout(db) == before
