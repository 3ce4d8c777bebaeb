"""Journal entries: what goes in comes out, and what this build does not know stops it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordination import commands as c
from tests.unit.coordination.drive import new_job

EVERY_COMMAND = [
    c.Submit(1, (new_job("a"), new_job("b", depends_on=("a",), unique_key="ключ")), "k", "d"),
    c.Submit(1, (), "", ""),
    c.Claim(1, "w", (c.Pick(1, '["GPU-1"]'), c.Pick(2, None))),
    c.Begin(1, "w", (c.Began("a", 1, 2),)),
    c.Finish(1, (c.AttemptDone("a", 1, "w", False, None, "boom\n\0", 137, True, 3, "exit"),)),
    c.Finish(1, (c.AttemptDone("a", 1, "w", False, None, "x", 1, True, 3, "cuda_oom", 24_000, b'{"step":7}'),)),
    c.Finish(1, (c.AttemptDone("a", 1, "w", True, b"\x00\xff", None, 0, True, 3, "exit"),)),
    c.Expire(1, (c.Lapse("a", 1, "timeout"),)),
    c.Release(1, ("a", "b"), "why", "k"),
    c.Cancel(1, ("a",), "why"),
    c.Retry(1, "a", "k"),
    c.Wake(1, 10),
    c.Clear(1, 5, True, 10),
    c.Prune(1, ("failed",), 5, -1, 10),
    c.ForgetWorkers(1, ("w",), "why"),
    c.ClaimGang(1, 7, (c.Place("w", '["GPU-1"]'), c.Place("v", None))),
    c.MarkNode(1, "w", True, False, 0, "why"),
    c.MarkNode(1, "w", False, True, 5, "why"),
    c.RetryMany(1, ("a", "b")),
    c.PutSchedule(1, "s", "{}", "api", 5),
    c.DropSchedule(1, "s", "file"),
    c.RunSchedule(1, "s", 5, 9, (new_job("a", array="1-3%2", no_retry="2"),), ""),
    c.RunSchedule(1, "s", 5, 9, (), "missed"),
]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda command: type(command).__name__)
def test_command_survives_the_journal(command: c.Command) -> None:
    again = c.decode(c.encode(command))
    assert again == command
    assert type(again) is type(command)
    for field in fields(command):
        value, back = getattr(command, field.name), getattr(again, field.name)
        if isinstance(value, tuple):
            assert [type(item) for item in value] == [type(item) for item in back]


def test_every_command_is_in_the_table_above() -> None:
    assert {type(command) for command in EVERY_COMMAND} == set(c._TYPES.values())


@given(ids=st.lists(st.text(max_size=20).filter(lambda t: t.isprintable())), at=st.integers(0, 1 << 62))
@settings(max_examples=50, deadline=None)
def test_any_ids_survive_the_journal(ids: list[str], at: int) -> None:
    command = c.Cancel(at, tuple(ids), "why", "k")
    assert c.decode(c.encode(command)) == command


def test_equal_commands_are_equal_bytes() -> None:
    assert c.encode(EVERY_COMMAND[0]) == c.encode(c.decode(c.encode(EVERY_COMMAND[0])))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(msgpack.packb((1, "Explode", 5)), id="unknown name"),
        pytest.param(msgpack.packb((2, "Wake", 5, 5)), id="newer version"),
        pytest.param(msgpack.packb((0, "Wake", 5, 5)), id="older version"),
        pytest.param(msgpack.packb((1, "Wake", 5)), id="field missing"),
        pytest.param(msgpack.packb((1, "Wake", 5, 5, 5)), id="field too many"),
        pytest.param(msgpack.packb((1, "Expire", 5, (("a", 1),))), id="item short"),
        pytest.param(msgpack.packb((1, "Expire")), id="items missing"),
        pytest.param(msgpack.packb(5), id="no array"),
        pytest.param(msgpack.packb(()), id="empty array"),
        pytest.param(b"\xc1", id="not msgpack"),
        pytest.param(c.encode(EVERY_COMMAND[0])[:-1], id="cut short"),
        pytest.param(c.encode(EVERY_COMMAND[0]) + b"\x00", id="something behind it"),
    ],
)
def test_entry_this_build_does_not_know_is_an_unknown_command(entry: bytes) -> None:
    with pytest.raises(c.UnknownCommand):
        c.decode(entry)


def test_entries_of_the_first_build_are_read() -> None:
    """As they lie in journals that were written before these fields came."""
    job = ("a", "command", "default", 50, "{}", 3, 0, 0, 0, None, (), b"{}")
    done = ("a", 1, "w", False, None, "boom", 1, True, 3, "exit")
    submit = c.decode(msgpack.packb((1, "Submit", 5, (job,), "k", "d")))
    assert submit == c.Submit(5, (c.NewJob(*job),), "k", "d")
    finish = c.decode(msgpack.packb((1, "Finish", 5, (done,))))
    assert finish == c.Finish(5, (c.AttemptDone(*done),))
    assert isinstance(finish, c.Finish)
    assert (finish.items[0].gpu_memory_mb, finish.items[0].checkpoint) == (0, None)


def test_unknown_version_is_told_with_the_known_one() -> None:
    entry: Any = msgpack.packb((7, "Wake", 5, 5))
    with pytest.raises(c.UnknownCommand, match="'Wake' of version 7: this build knows 1"):
        c.decode(entry)
