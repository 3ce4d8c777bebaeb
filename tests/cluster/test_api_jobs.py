"""``/jobs`` from the outside: submitting, looking, and changing one's mind, with real processes behind it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import NodeProcess, node_offering, wait_until

NO_JOB = "1m0000000000000000000"


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"command": ["sh", "-c", script], **more}


def key(value: str) -> dict[str, str]:
    return {"Idempotency-Key": value}


def alive(pid: int) -> bool:
    """Whether a process of this id runs; one that is only waiting to be reaped does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def pids_in(path: Path, count: int = 1) -> list[int]:
    """The process ids that a job has written to `path`, one a line, once there are `count`."""

    def written() -> list[int]:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [int(line) for line in lines if line.endswith("\n")]
        return found if len(found) >= count else []

    return list(wait_until(written))


@pytest.fixture(scope="module")
def one_slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with one core, two GPUs and a label."""
    folder = tmp_path_factory.mktemp("one-slot")
    gpus = [
        {"model": "NVIDIA A100-SXM4-40GB", "memory_mb": 40_000, "compute_capability": "8.0", "uuid": "GPU-aa"},
        {"model": "NVIDIA H100 80GB HBM3", "memory_mb": 80_000, "compute_capability": "9.0", "uuid": "GPU-bb"},
    ]
    with node_offering(folder, {"cpus": 1, "memory_mb": 1000, "gpus": gpus, "labels": {"zone": "eu"}}) as node:
        yield node


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file for which jobs wait; it appears at the end of the test at the latest, so that none stays behind."""
    path = tmp_path / "gate"
    yield path
    if tmp_path.exists():
        path.touch()


def until(gate: Path, then: str = "true") -> str:
    """A shell line that waits for the gate."""
    return f'while [ ! -e "{gate}" ]; do sleep 0.02; done; {then}'


# -- submitting --------------------------------------------------------------------------------------------------------


def test_one_job_gets_201_its_id_its_place_and_a_key(desk: NodeProcess) -> None:
    status, headers, told = desk.exchange("POST", "/jobs", sh("true", priority=7, group="g1"))
    assert (status, set(told)) == (201, {"id", "created"})
    assert told["created"] is True
    assert headers["location"] == f"/jobs/{told['id']}"
    assert len(headers["idempotency-key"]) >= 16
    assert int(headers["x-p2p-index"]) > 0
    record = desk.job(told["id"])
    assert (record["state"], record["priority"], record["group"], record["kind"]) == ("pending", 7, "g1", "command")
    assert (record["attempt"], record["worker"], record["max_attempts"]) == (0, None, 3)
    assert abs(record["created_at"] - time.time()) < 30


def test_a_batch_gets_its_ids_in_order(desk: NodeProcess) -> None:
    status, _, told = desk.exchange("POST", "/jobs", {"jobs": [sh("true", priority=n) for n in range(5)]})
    assert (status, told["created"]) == (201, [True] * 5)
    assert [desk.job(job)["priority"] for job in told["ids"]] == [0, 1, 2, 3, 4]


def test_a_large_batch_is_all_in_or_all_out(desk: NodeProcess) -> None:
    before = desk.request("GET", "/work_queue_status")[1]["pending"]
    jobs = [sh("true") for _ in range(3_000)]
    status, told = desk.request("POST", "/jobs", {"jobs": [*jobs, sh("true", priority=101)]})
    assert (status, told["field"]) == (422, "jobs[3000].priority")
    assert desk.request("GET", "/work_queue_status")[1]["pending"] == before
    status, told = desk.request("POST", "/jobs", {"jobs": jobs})
    assert (status, len(set(told["ids"]))) == (201, 3_000)
    assert desk.request("GET", "/work_queue_status")[1]["pending"] == before + 3_000
    # Gone again: the other tests of this module would list them.
    desk.request("POST", "/work_queue/clear", {})


def test_the_same_key_and_body_give_the_first_answer_again_with_200(desk: NodeProcess) -> None:
    for body, name in ((sh("true"), "id"), ({"jobs": [sh("true"), sh("false")]}, "ids")):
        status, headers, first = desk.exchange("POST", "/jobs", body, headers=key(f"again-{name}"))
        assert (status, headers["idempotency-key"]) == (201, f"again-{name}")
        for _ in range(3):
            status, _, again = desk.exchange("POST", "/jobs", body, headers=key(f"again-{name}"))
            assert (status, again[name]) == (200, first[name])
            assert not any(again["created"]) if name == "ids" else again["created"] is False


def test_a_key_that_the_node_made_works_as_one_that_was_given(desk: NodeProcess) -> None:
    _, headers, first = desk.exchange("POST", "/jobs", sh("true"))
    status, told = desk.request("POST", "/jobs", sh("true"), headers=key(headers["idempotency-key"]))
    assert (status, told["id"]) == (200, first["id"])
    assert desk.request("POST", "/jobs", sh("true"))[1]["id"] != first["id"]


def test_the_same_key_with_another_body_is_refused_and_adds_nothing(desk: NodeProcess) -> None:
    assert desk.request("POST", "/jobs", sh("true"), headers=key("two-faced"))[0] == 201
    before = desk.request("GET", "/work_queue_status")[1]["totals"]
    status, headers, told = desk.exchange("POST", "/jobs", sh("false"), headers=key("two-faced"))
    assert (status, told["field"]) == (422, "Idempotency-Key")
    assert headers["content-type"] == "application/problem+json"
    assert desk.request("GET", "/work_queue_status")[1]["totals"] == before


def test_a_key_does_not_carry_a_change_over_to_another_job(desk: NodeProcess) -> None:
    first, second = desk.submit(**sh("true")), desk.submit(**sh("true"))
    for _ in range(2):
        assert desk.request("POST", f"/jobs/{first}/cancel", {}, headers=key("cancel-it"))[0] == 200
    status, told = desk.request("POST", f"/jobs/{second}/cancel", {}, headers=key("cancel-it"))
    assert (status, told["field"]) == (422, "Idempotency-Key")
    assert desk.job(second)["state"] == "pending"


def test_a_unique_key_has_one_unfinished_job(desk: NodeProcess) -> None:
    status, told = desk.request("POST", "/jobs", sh("true", unique_key="only"))
    assert status == 201
    assert desk.request("POST", "/jobs", sh("false", unique_key="only")) == (200, {"id": told["id"], "created": False})
    status, batch = desk.request("POST", "/jobs", {"jobs": [sh("true"), sh("true", unique_key="only")]})
    assert (status, batch["created"], batch["ids"][1]) == (201, [True, False], told["id"])
    desk.request("POST", f"/jobs/{told['id']}/cancel", {})
    status, after = desk.request("POST", "/jobs", sh("true", unique_key="only"))
    assert status == 201 and after["id"] != told["id"]
    status, refused = desk.request("POST", f"/jobs/{told['id']}/retry", {})
    assert (status, refused["field"]) == (409, "unique_key")


def test_a_job_that_waits_for_a_taken_unique_key_waits_for_the_one_that_has_it(desk: NodeProcess) -> None:
    holder = desk.submit(**sh("true", unique_key="held"))
    jobs = [sh("false", unique_key="held"), sh("true", depends_on=["#0"])]
    ids = desk.request("POST", "/jobs", {"jobs": jobs})[1]["ids"]
    assert ids[0] == holder
    assert desk.job(ids[1])["state"] == "waiting"


# -- looking -----------------------------------------------------------------------------------------------------------


def test_pages_by_cursor_hold_every_job_once_while_others_come_in(desk: NodeProcess) -> None:
    made: list[str] = []
    for n in range(3):
        jobs = [sh("true", group=f"page{n}") for _ in range(400)]
        made += desk.request("POST", "/jobs", {"jobs": jobs})[1]["ids"]
    for query, wanted in (
        ("", None),
        ("group=page1&", made[400:800]),
        ("state=pending&group=page2&", made[800:]),
        ("kind=command&group=page0&state=pending&", made[:400]),
        ("group=nobody&", []),
        ("state=completed&", []),
    ):
        seen: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            status, page = desk.request("GET", f"/jobs?{query}limit=97" + (f"&cursor={cursor}" if cursor else ""))
            assert status == 200 and len(page["jobs"]) <= 97
            seen += [job["id"] for job in page["jobs"]]
            cursor = page["cursor"]
            if query == "":
                desk.submit(**sh("true", group="late"))
        assert len(seen) == len(set(seen))
        if wanted is None:
            assert [job for job in seen if job in set(made)] == made[::-1]
        else:
            assert seen == wanted[::-1]
    desk.request("POST", "/work_queue/clear", {})


def test_a_listing_filters_by_kind_alias_and_state(desk: NodeProcess) -> None:
    one = desk.submit(kind="gauntlet")
    assert desk.job(one)["kind"] == "evaluation"
    for query in ("kind=gauntlet", "kind=evaluation", "kind=evaluation&state=pending"):
        assert [job["id"] for job in desk.request("GET", f"/jobs?{query}")[1]["jobs"]] == [one]
    assert desk.request("GET", "/jobs?kind=evaluation&state=failed")[1]["jobs"] == []
    desk.request("POST", f"/jobs/{one}/cancel", {})


def test_a_pending_job_says_that_no_worker_has_asked(desk: NodeProcess) -> None:
    assert desk.job(desk.submit(**sh("true")))["why_pending"] == "no worker has asked for work yet"


IMPOSSIBLE = {
    "cpus": ({"cpus": 64}, "needs 64 cores; the largest node has 1 on n1"),
    "memory": ({"memory_mb": 2000}, "needs 2000 MB of memory; the largest node has 1000 on n1"),
    "node": ({"node": "elsewhere"}, "asks for node elsewhere"),
    "label": ({"labels": {"zone": "us"}}, "needs label zone=us; n1 has zone=eu"),
    "label-absent": ({"labels": {"rack": "1"}}, "needs label rack=1; n1 has rack=(none)"),
    "gpus": ({"gpus": 3}, "needs 3 GPUs; the most on one node is 2"),
    "gpu-memory": (
        {"gpus": 2, "gpu_memory_mb": 50_000},
        "needs 50000 MB on each of 2 GPUs; the most on one node is 1",
    ),
    "gpu-memory-all": (
        {"gpus": 1, "gpu_memory_mb": 90_000},
        "needs 90000 MB on one GPU; the largest GPU has 80000 MB on n1",
    ),
    "gpu-model": ({"gpus": 1, "gpu_model": "B200|MI300"}, "of model B200|MI300"),
    "capability": (
        {"gpus": 1, "min_compute_capability": "10.0"},
        "needs 1 GPU of compute capability 10.0; the most on one node is 0",
    ),
}


@pytest.mark.parametrize(("requires", "says"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_job_that_can_never_be_placed_says_why(one_slot: NodeProcess, requires: dict[str, Any], says: str) -> None:
    job = one_slot.submit(**sh("true", requires={"cpus": 1, **requires}))

    def placed() -> str:
        why = str(one_slot.job(job)["why_pending"])
        return "" if why.startswith("no worker") else why

    why = wait_until(placed)
    assert why.startswith("fits on none of 1 node, even when idle: ")
    assert says in why
    one_slot.request("POST", f"/jobs/{job}/cancel", {})


def test_a_job_that_waits_for_room_says_so(one_slot: NodeProcess, gate: Path) -> None:
    first = one_slot.submit(**sh(until(gate)))
    one_slot.wait_for(first, "running")
    second = one_slot.submit(**sh("true"))
    wait_until(lambda: "waits for room" in one_slot.job(second)["why_pending"])
    words = "waits for room: needs 1 cores; the most free is 0 on n1; first in line"
    assert one_slot.job(second)["why_pending"].startswith(words)
    gate.touch()
    assert "why_pending" not in one_slot.wait_for(second, "completed")


# -- changing it -------------------------------------------------------------------------------------------------------


def test_what_can_be_changed_depends_on_the_state(desk: NodeProcess) -> None:
    job = desk.submit(**sh("true"))

    def ask(verb: str) -> tuple[int, Any]:
        return desk.request("POST", f"/jobs/{job}/{verb}", {"reason": "a whim"} if verb != "retry" else {})

    for verb in ("release", "retry"):
        status, told = ask(verb)
        assert (status, told["field"]) == (409, "state")
        assert "is pending" in told["detail"]
    status, told = ask("cancel")
    assert (status, told["id"], told["state"], told["reason"]) == (200, job, "cancelled", "a whim")
    for verb in ("cancel", "release"):
        assert ask(verb)[0] == 409
    status, told = ask("retry")
    assert (status, told["state"], told["failed_attempts"]) == (200, "pending", 0)
    assert ask("retry")[0] == 409
    assert [step["state"] for step in desk.job(job)["history"]] == ["pending", "cancelled", "pending"]
    for verb in ("cancel", "release", "retry"):
        assert desk.request("POST", f"/jobs/{NO_JOB}/{verb}", {})[0] == 404


def test_cancel_ends_the_whole_process_group_at_once(running_node: NodeProcess, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # A child and a grandchild, deaf to polite requests, and a parent that is not.
    deaf = f"trap '' TERM; (echo $(exec sh -c 'echo $PPID') >> {pids}; while :; do sleep 0.05; done) & "
    job = running_node.submit(**sh(f"{deaf} echo $$ >> {pids}; wait", grace_seconds=0.2))
    group = pids_in(pids, 2)
    assert all(alive(pid) for pid in group)
    running_node.wait_for(job, "running")
    begun = time.monotonic()
    status, told = running_node.request("POST", f"/jobs/{job}/cancel", {"reason": "enough"})
    assert (status, told["state"], told["reason"]) == (200, "cancelled", "enough")
    wait_until(lambda: not any(alive(pid) for pid in group), seconds=10)
    assert time.monotonic() - begun < 5
    assert running_node.job(job)["state"] == "cancelled"


def test_release_runs_the_job_again_and_the_old_process_goes(
    running_node: NodeProcess, tmp_path: Path, gate: Path
) -> None:
    pids = tmp_path / "pids"
    job = running_node.submit(**sh(f"echo $$ >> {pids}; {until(gate)}; exit $P2P_ATTEMPT", max_attempts=1))
    (old,) = pids_in(pids)
    running_node.wait_for(job, "running")
    status, told = running_node.request("POST", f"/jobs/{job}/release", {"reason": "stuck_timeout"})
    assert (status, told["failed_attempts"]) == (200, 0)
    both = pids_in(pids, 2)
    wait_until(lambda: not alive(old), seconds=10)
    assert alive(both[1])
    wait_until(lambda: running_node.job(job)["state"] == "running")
    gate.touch()
    record = running_node.wait_for(job, "failed", "completed")
    assert (record["attempt"], record["exit_code"], record["failed_attempts"]) == (2, 2, 1)
    states = [(step["state"], step["attempt"]) for step in record["history"]]
    assert ("pending", 1) in states and states[-2:] == [("running", 2), ("failed", 2)]
    assert any("stuck_timeout" in (step["reason"] or "") for step in record["history"])


def test_a_failed_job_that_is_retried_starts_over(running_node: NodeProcess, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    job = running_node.submit(**sh(f'test -e "{flag}"', max_attempts=2, retry_backoff_seconds=0))
    failed = running_node.wait_for(job, "failed")
    assert (failed["attempt"], failed["failed_attempts"], failed["exit_code"]) == (2, 2, 1)
    flag.touch()
    assert running_node.request("POST", f"/jobs/{job}/retry", {})[0] == 200
    record = running_node.wait_for(job, "completed", "failed")
    assert (record["state"], record["attempt"], record["error"]) == ("completed", 3, None)


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.3, 0.0001])
def test_a_timeout_ends_the_attempt_and_is_told_as_one(running_node: NodeProcess, seconds: float) -> None:
    job = running_node.submit(**sh("sleep 60", timeout_seconds=seconds, max_attempts=1, grace_seconds=0.5))
    record = running_node.wait_for(job, "failed", "completed", seconds=15)
    assert (record["state"], record["reason"]) == ("failed", "timeout")
    assert "time" in record["error"]


def test_not_before_keeps_a_job_back_until_its_time(running_node: NodeProcess) -> None:
    due = time.time() + 1.0
    job = running_node.submit(**sh("true", not_before=due))
    waiting = running_node.job(job)
    assert waiting["state"] == "waiting"
    assert waiting["why_pending"].startswith("not before its time; due in ")
    record = running_node.wait_for(job, "completed")
    assert due - 0.01 <= record["started_at"] < due + 5
    past = running_node.submit(**sh("true", not_before="2020-01-31T08:00:00+01:00"))
    assert running_node.wait_for(past, "completed")["history"][0]["state"] == "pending"


def test_dependencies_run_in_order_and_a_failed_one_cancels_what_waits(
    running_node: NodeProcess, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    jobs = [
        sh(f"sleep 0.2; echo a >> {order}"),
        sh(f"echo b >> {order}", depends_on=["#0"]),
        sh(f"echo c >> {order}", depends_on=["#0", "#1"]),
        sh("exit 1", max_attempts=1, depends_on=["#2"]),
        sh(f"echo never >> {order}", depends_on=["#3"]),
        sh(f"echo never >> {order}", depends_on=["#4"]),
    ]
    ids = running_node.request("POST", "/jobs", {"jobs": jobs})[1]["ids"]
    assert running_node.job(ids[2])["depends_on"] == ids[:2]
    last = running_node.wait_for(ids[5], "cancelled")
    assert last["reason"] == f"dependency {ids[4]} cancelled"
    assert running_node.job(ids[4])["reason"] == f"dependency {ids[3]} failed"
    assert order.read_text() == "a\nb\nc\n"
    late = running_node.submit(**sh("true", depends_on=[ids[3]]))
    assert running_node.job(late)["state"] == "cancelled"
    fine = running_node.submit(**sh("true", depends_on=[ids[0]]))
    assert running_node.wait_for(fine, "completed")["state"] == "completed"


def test_with_one_slot_the_higher_priority_goes_first_and_then_the_older(
    one_slot: NodeProcess, tmp_path: Path, gate: Path
) -> None:
    order = tmp_path / "order"
    blocker = one_slot.submit(**sh(until(gate)))
    one_slot.wait_for(blocker, "running")
    jobs = [sh(f"echo {n} >> {order}", priority=p) for n, p in enumerate((10, 90, 50, 90, 0, 50))]
    ids = one_slot.request("POST", "/jobs", {"jobs": jobs})[1]["ids"]
    gate.touch()
    for job in ids:
        one_slot.wait_for(job, "completed")
    assert order.read_text().split() == ["1", "3", "2", "5", "0", "4"]


# -- what a process sees and says ------------------------------------------------------------------------------------


def test_progress_and_result_reach_the_record(start_node: Callable[..., NodeProcess], gate: Path) -> None:
    node = start_node("--no-populate", queue={"heartbeat_seconds": 0.1})
    deep = {"score": [1, 2.5, "é", None, {"deep": True}], "big": 10**25}
    script = (
        'echo \'{"step": 1}\' > "$P2P_JOB_DIR/.p" && mv "$P2P_JOB_DIR/.p" "$P2P_JOB_DIR/progress.json"; '
        f"{until(gate)}; printf '%s' '{json.dumps(deep)}' > \"$P2P_JOB_DIR/result.json\""
    )
    job = node.submit(**sh(script))
    wait_until(lambda: node.job(job).get("progress") == {"step": 1})
    assert node.job(job)["last_sign_of_life_seconds"] < 10
    gate.touch()
    assert node.wait_for(job, "completed")["result"] == deep


BAD_RESULTS = {
    "half": ("printf '{\"a\": 1'", "is not JSON"),
    "empty": ("printf ''", "is not JSON"),
    "not-utf-8": ("printf '\"\\377\"'", "is not JSON"),
    "too-large": ("head -c 1100000 /dev/zero | tr '\\0' 1", "larger than 1048576 bytes"),
    "deep": ("head -c 100000 /dev/zero | tr '\\0' '['", "is not JSON"),
}


@pytest.mark.parametrize(("writes", "says"), BAD_RESULTS.values(), ids=BAD_RESULTS.keys())
def test_exit_0_completes_and_an_unreadable_result_is_told(running_node: NodeProcess, writes: str, says: str) -> None:
    job = running_node.submit(**sh(f'{writes} > "$P2P_JOB_DIR/result.json"', max_attempts=1))
    record = running_node.wait_for(job, "failed", "completed")
    assert (record["state"], record["exit_code"], record["result"]) == ("completed", 0, None)
    assert says in record["error"] and "result.json" in record["error"]


def test_not_a_number_in_a_result_is_null(running_node: NodeProcess) -> None:
    job = running_node.submit(**sh("""printf '{"loss": NaN}' > "$P2P_JOB_DIR/result.json" """))
    record = running_node.wait_for(job, "failed", "completed")
    assert (record["state"], record["result"], record["error"]) == ("completed", {"loss": None}, None)


def test_a_process_gets_exactly_the_arguments_environment_and_folder_asked_for(
    running_node: NodeProcess, tmp_path: Path
) -> None:
    odd = ["", " ", "a b", "$HOME", "`id`", "'\"\\", "*", "é🦀", "-n", "line\nbreak", "{x}", "{who}", "{0}", "%s"]
    env = {"PLAIN": "1", "EMPTY": "", "ODD": "a=b c\n'\"é🦀", "PATH_LIKE": "/x:/y", "lower_case": "yes"}
    look = (
        "import json, os, sys; "
        "told = {'args': sys.argv[1:], 'env': dict(os.environ), 'cwd': os.getcwd()}; "
        "json.dump(told, open(os.environ['P2P_JOB_DIR'] + '/result.json', 'w'))"
    )
    job = running_node.submit(
        command=["python", "-c", look, *odd], env=env, cwd=str(tmp_path), params={"who": "you {x}", "n": 5}
    )
    record = running_node.wait_for(job, "completed", "failed")
    assert record["state"] == "completed", record["error"]
    result = record["result"]
    assert result["args"] == [*odd[:11], "you {x}", *odd[12:]]
    assert result["cwd"] == str(tmp_path.resolve())
    seen = result["env"]
    assert {name: seen[name] for name in env} == env
    assert seen["P2P_JOB_ID"] == job
    assert (seen["P2P_ATTEMPT"], seen["P2P_NODE_ID"], seen["P2P_URL"]) == ("1", "n1", running_node.url)
    assert Path(seen["P2P_JOB_DIR"]).is_dir() and job in seen["P2P_JOB_DIR"]
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert (record["env"], record["cwd"], record["params"]) == (env, str(tmp_path), {"who": "you {x}", "n": 5})


def test_without_cwd_a_process_starts_in_its_own_folder(running_node: NodeProcess) -> None:
    job = running_node.submit(**sh('[ "$PWD" -ef "$P2P_JOB_DIR" ] && [ -z "$CUDA_VISIBLE_DEVICES" ]'))
    assert running_node.wait_for(job, "completed", "failed")["state"] == "completed"


@pytest.mark.parametrize(
    ("job", "code", "says"),
    [
        ({"command": ["/no/such/program"]}, 127, "/no/such/program"),
        ({"command": ["no-such-program-anywhere"]}, 127, "no-such-program-anywhere"),
        ({"command": ["/etc/passwd"]}, 126, "/etc/passwd"),
        ({"command": ["true"], "cwd": "/no/such/folder"}, 126, "/no/such/folder"),
        (sh("kill -9 $$"), -9, "SIGKILL|signal 9|killed"),
        (sh("echo last words >&2; exit 42"), 42, "last words"),
    ],
    ids=["no-program", "not-on-path", "not-executable", "no-folder", "killed", "exit-42"],
)
def test_an_attempt_that_fails_says_how(running_node: NodeProcess, job: dict[str, Any], code: int, says: str) -> None:
    record = running_node.wait_for(running_node.submit(**job, max_attempts=1), "failed", "completed")
    assert (record["state"], record["exit_code"]) == ("failed", code), record["error"]
    assert any(word in record["error"] for word in says.split("|")), record["error"]


# -- GPUs --------------------------------------------------------------------------------------------------------------

NO_CPU = {"cpus": 0}


def visible(node: NodeProcess, gate: Path, **requires: Any) -> dict[str, Any]:
    """A job that writes down its GPUs and waits for the gate; its record once it runs."""
    script = f'printf \'"%s"\' "$CUDA_VISIBLE_DEVICES" > "$P2P_JOB_DIR/result.json"; {until(gate)}'
    job = node.submit(**sh(script, requires=NO_CPU | requires))
    return node.wait_for(job, "running")


GPU_CHOICES = {
    "smallest-that-fits": ({"gpus": 1}, ["GPU-aa"]),
    "by-memory": ({"gpus": 1, "gpu_memory_mb": 50_000}, ["GPU-bb"]),
    "by-model": ({"gpus": 1, "gpu_model": "H100|B200"}, ["GPU-bb"]),
    "by-capability": ({"gpus": 1, "min_compute_capability": "8.9"}, ["GPU-bb"]),
    "both": ({"gpus": 2}, ["GPU-aa", "GPU-bb"]),
    "none": ({}, []),
}


@pytest.mark.parametrize(("requires", "granted"), GPU_CHOICES.values(), ids=GPU_CHOICES.keys())
def test_a_job_gets_gpus_that_fit_and_sees_only_those(
    one_slot: NodeProcess, gate: Path, requires: dict[str, Any], granted: list[str]
) -> None:
    record = visible(one_slot, gate, **requires)
    assert sorted(record["gpus"]) == granted
    gate.touch()
    result = one_slot.wait_for(record["id"], "completed")["result"]
    assert sorted(filter(None, result.split(","))) == granted


def test_shares_of_a_gpu_are_packed_and_whole_ones_stay_whole(one_slot: NodeProcess, gate: Path) -> None:
    half = {"gpus": 1, "gpu_share": 0.5}
    first, second = visible(one_slot, gate, **half), visible(one_slot, gate, **half)
    assert first["gpus"] == second["gpus"] == ["GPU-aa"]
    whole = visible(one_slot, gate, gpus=1)
    assert whole["gpus"] == ["GPU-bb"]
    extra = one_slot.submit(**sh("true", requires=NO_CPU | half))
    wait_until(lambda: "waits for room" in one_slot.job(extra)["why_pending"])
    assert "needs 0.5 of a GPU; the most free of one is 0" in one_slot.job(extra)["why_pending"]
    gate.touch()
    for record in (first, second, whole):
        one_slot.wait_for(record["id"], "completed")
    one_slot.wait_for(extra, "completed")


def test_this_file_leaves_no_process_behind(running_node: NodeProcess, one_slot: NodeProcess) -> None:
    for node in (running_node, one_slot):
        wait_until(lambda node=node: node.request("GET", "/status")[1]["peers"]["n1"]["running_jobs"] == 0)
    assert os.getpid() not in (running_node.process.pid, one_slot.process.pid)  # type: ignore[union-attr]
