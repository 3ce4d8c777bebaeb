"""What operators grep: one event is one line, troubles are JSON, and the files stay bounded."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from coordination.event_log import EventLog, RotatingFile, line, trouble
from coordination.events import WARNINGS, Event
from coordination.events import EventType as E

AT = 1_700_000_000_123
LINE = re.compile(
    r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING) [A-Z_]+( [a-z_]+=(\"(\\.|[^\"\\])*\"|[^\s\"]*))*\n$"
)


def test_line_is_time_level_event_and_fields() -> None:
    event = Event(E.WORK_CLAIMED, AT, {"job": "j1", "kind": "selfplay", "attempt": 2, "worker": "n1"})
    assert line(event) == "2023-11-14T22:13:20.123Z INFO WORK_CLAIMED job=j1 kind=selfplay attempt=2 worker=n1\n"


@pytest.mark.parametrize("type", list(E))
def test_level_is_that_of_the_event(type: E) -> None:
    level = "WARNING" if type in WARNINGS else "INFO"
    assert line(Event(type, AT, {"a": 1})) == f"2023-11-14T22:13:20.123Z {level} {type} a=1\n"
    assert {E.WORK_FAILED, E.WORK_TIMEOUT, E.WORK_STALLED, E.ALERT_RAISED, E.DAEMON_FAILED, E.NODE_DEAD} <= WARNINGS
    assert not {E.WORK_QUEUED, E.WORK_COMPLETED, E.ALERT_CLEARED} & WARNINGS


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("a\nb", '"a\\nb"'),
        ("a\r\tb", '"a\\r\\tb"'),
        ("\u2028", '"\\u2028"'),
        ("\u0085", '"\\u0085"'),
        ("\x1b[31m", '"\\u001b[31m"'),
        ('say "x"', '"say \\"x\\""'),
        ("naïve", "naïve"),
        (5, "5"),
        (1.5, "1.5"),
        (True, "true"),
        ([1, 2], '"[1, 2]"'),
    ],
)
def test_value_never_breaks_the_line(value: Any, text: str) -> None:
    written = line(Event(E.WORK_FAILED, AT, {"error": value}))
    assert written == f"2023-11-14T22:13:20.123Z WARNING WORK_FAILED error={text}\n"
    assert LINE.match(written)
    assert len(written.splitlines()) == 1


def test_field_that_is_nothing_is_left_out() -> None:
    assert line(Event(E.WORK_FAILED, AT, {"job": "j", "exit_code": None})).endswith("WORK_FAILED job=j\n")


@pytest.mark.parametrize("seconds", [0, 1_699_999_999, 1_700_000_000, 1_700_000_000])
def test_time_is_right_whichever_second_came_before(seconds: int) -> None:
    from datetime import UTC, datetime

    text = line(Event(E.WORK_QUEUED, seconds * 1_000 + 7, {})).split(" ")[0]
    assert datetime.fromisoformat(text) == datetime.fromtimestamp(seconds + 0.007, UTC)


FAILED = {
    "job": "j",
    "kind": "command",
    "attempt": 1,
    "worker": "w",
    "error": "exit code 3",
    "exit_code": 3,
    "cause": "exit",
}


def logged(folder: Path, *events: Event) -> tuple[str, str]:
    log = EventLog(folder)
    log.on_events(list(enumerate(events, 1)))
    log.close()
    return (folder / "coordination.log").read_text(), (folder / "work_queue.log").read_text()


def test_error_reads_as_the_runbook_greps_for_it(tmp_path: Path) -> None:
    logged(tmp_path, Event(E.WORK_FAILED, AT, FAILED), Event(E.WORK_RETRIED, AT, {**FAILED, "error": "a\nb"}))
    command = ["grep", "-oP", r'error": "\K[^"]+', str(tmp_path / "work_queue.log")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["exit code 3", "a\\nb"]


def test_trouble_is_one_json_object_a_line(tmp_path: Path) -> None:
    _, queue = logged(tmp_path, *(Event(E.WORK_FAILED, AT, {**FAILED, "error": 'a "b"\n\u2028'}) for _ in range(3)))
    bodies = [json.loads(text) for text in queue.splitlines()]
    assert [body["detail"] for body in bodies] == ['a "b"\n\u2028'] * 3
    assert [body["error"] for body in bodies] == ["a 'b'"] * 3
    assert bodies[0]["event"] == "WORK_FAILED"


def test_ordinary_lines_have_none_of_the_words_that_mean_trouble(tmp_path: Path) -> None:
    """``grep -ci 'stall\\|stuck\\|timeout'`` must find troubles only."""
    fields = {**FAILED, "timeout_ms": 5}
    _, queue = logged(
        tmp_path, *(Event(type, AT, fields) for type in E if type not in (E.WORK_TIMEOUT, E.WORK_STALLED))
    )
    assert [json.loads(text)["event"] for text in queue.splitlines()] == ["WORK_FAILED", "WORK_RETRIED"]
    assert not re.search("stall|stuck|timeout", queue, re.IGNORECASE)


def test_stall_and_timeout_are_found_by_their_words() -> None:
    assert re.search("timeout", trouble(Event(E.WORK_TIMEOUT, AT, {**FAILED, "cause": "timeout"})), re.IGNORECASE)
    assert re.search("stall", trouble(Event(E.WORK_STALLED, AT, FAILED)), re.IGNORECASE)
    assert '"timeout_ms": 5' in trouble(Event(E.WORK_TIMEOUT, AT, {**FAILED, "timeout_ms": 5}))


def test_every_event_is_in_the_coordination_log_in_order(tmp_path: Path) -> None:
    events, _ = logged(tmp_path, *(Event(type, AT, {"n": n}) for n, type in enumerate(E)))
    assert [text.split()[2] for text in events.splitlines()] == [str(type) for type in E]


def test_log_goes_on_where_it_was(tmp_path: Path) -> None:
    logged(tmp_path, Event(E.WORK_QUEUED, AT, {"n": 1}))
    events, _ = logged(tmp_path, Event(E.WORK_QUEUED, AT, {"n": 2}))
    assert [text.split()[3] for text in events.splitlines()] == ["n=1", "n=2"]


def test_events_beyond_what_may_wait_are_dropped_oldest_first_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordination.event_log.MAX_WAITING", 3)
    log = EventLog(tmp_path)
    with log._wake:  # the writer waits
        log.on_events([(n, Event(E.WORK_QUEUED, AT, {"n": n})) for n in range(5)])
    log.close()
    assert log.dropped == 2
    written = (tmp_path / "coordination.log").read_text().splitlines()
    assert [text.split()[3] for text in written] == ["n=2", "n=3", "n=4"]


# -- rotation --------------------------------------------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_files_rotate_before_they_exceed_the_limit_and_the_oldest_goes(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", limit=100, kept=5)
    for n in range(40):
        file.write(f"{n:029d}\n")
    file.close()
    assert set(sizes(tmp_path)) == {"x.log", *(f"x.log.{n}" for n in range(1, 6))}
    assert max(sizes(tmp_path).values()) <= 100
    newest_first = [tmp_path / "x.log", *(tmp_path / f"x.log.{n}" for n in range(1, 6))]
    numbers = [int(text) for path in reversed(newest_first) for text in path.read_text().splitlines()]
    assert numbers == list(range(40 - len(numbers), 40))


def test_limit_is_of_bytes_not_of_letters(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", limit=100)
    for _ in range(5):
        file.write("ü" * 30)
    file.close()
    assert max(sizes(tmp_path).values()) <= 100


def test_size_of_a_log_that_was_there_counts(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("x" * 90)
    file = RotatingFile(tmp_path / "x.log", limit=100)
    file.write("y" * 20)
    file.close()
    assert sizes(tmp_path) == {"x.log": 20, "x.log.1": 90}


@pytest.mark.parametrize("full", [False, True])
def test_log_removed_by_a_clean_up_is_made_anew(tmp_path: Path, full: bool) -> None:
    """When it was full as well, the rotation once failed for ever after, and nothing more was written."""
    file = RotatingFile(tmp_path / "x.log", limit=100)
    file.write("x" * (95 if full else 5))
    (tmp_path / "x.log").unlink()
    file.write("y" * 20)
    file.close()
    assert sizes(tmp_path) == {"x.log": 20}


def test_text_no_encoding_holds_is_written_escaped(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log")
    file.write("\ud800\n")
    file.close()
    assert (tmp_path / "x.log").read_text() == "\\ud800\n"


def test_the_runbooks_grep_shows_what_a_python_traceback_says(tmp_path: Path) -> None:
    said = (
        'exit code 1: Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nValueError: bad "thing"'
    )
    _, queue = logged(tmp_path, Event(E.WORK_FAILED, AT, {**FAILED, "error": said}))
    assert re.search('error": "([^"]+)', queue)[1] == "exit code 1: ValueError: bad 'thing'"  # type: ignore[index]
    assert json.loads(queue)["detail"] == said
