"""For every section of P2P_LEADER_FAILOVER.md: its situation, and what must be true after each block. See `scenes`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator

from tests.nodes import wait_until
from tests.runbook.deployment import Outcome
from tests.runbook.fleet import VOTERS, Fleet

Steps = Generator[None, Outcome, None]
SCENES: dict[str, Callable[[Fleet], Steps]] = {}


def scene(section: str) -> Callable[[Callable[[Fleet], Steps]], Callable[[Fleet], Steps]]:
    def register(function: Callable[[Fleet], Steps]) -> Callable[[Fleet], Steps]:
        assert section not in SCENES, section
        SCENES[section] = function
        return function

    return register


@scene("Before you begin")
def before_you_begin(f: Fleet) -> Steps:
    done = yield
    assert set(VOTERS) <= set(done.output.split())
    assert f"{f.leader.name} leads term" in done.output


@scene("Who leads")
def who_leads(f: Fleet) -> Steps:
    done = yield
    lines = done.output.splitlines()
    assert lines[0].startswith(f"{f.leader.name} leads term {f.leader.status()['term']}, since ")
    assert f"LEADER_ELECTED node={f.leader.name} term={f.leader.status()['term']}" in lines[-1]


@scene("What happens when a leader dies")
def a_leader_dies(f: Fleet) -> Steps:
    f.lead("box-3")
    job = f.here.submit("true", requires={"cpus": 900})
    done = yield
    assert f.leader.name != "box-3"
    assert not f["box-3"].running
    assert f"{f.leader.name} leads term" in done.output
    assert f.here.job(job)["state"] == "pending"
    yield
    assert all(f[name].ready() for name in VOTERS)
    f.wait_voters(*VOTERS)


@scene("No leader")
def no_leader(f: Fleet) -> Steps:
    for name in ("box-2", "box-3"):
        f[name].kill()
    wait_until(lambda: f.here.status().get("not_ready") == "no leader")
    done = yield
    said = dict(line.split(": ", 1) for line in done.output.splitlines() if line.startswith("box-"))
    assert '"reason": "no leader"' in said["box-1"]
    assert "ready" not in said["box-2"] + said["box-3"]
    f["box-2"].launch()
    wait_until(lambda: f["box-2"].ready() and f.here.ready())
    f.lead("box-2")
    term = f.here.status()["term"]
    done = yield
    assert '"leader":"box-1"' in done.output
    assert "this node leads term" in done.output
    assert f.here.status()["term"] > term


@scene("A leader that changes too often")
def changes_too_often(f: Fleet) -> Steps:
    before = (f.here.project / "logs/coordination.log").read_text().count(" LEADER_ELECTED ")
    for name in ("box-2", "box-3", "box-2"):
        f.lead(name)
    done = yield
    counted = sum(int(line.split()[0]) for line in done.output.splitlines())
    assert counted >= before + 3
    done = yield
    assert "leads term" in done.output


@scene("A frozen leader")
def frozen_leader(f: Fleet) -> Steps:
    f.lead("box-3")
    frozen = f["box-3"]
    f.signal("box-3", signal.SIGSTOP)
    wait_until(lambda: f.here.status().get("leader_id") in ("box-1", "box-2"))
    done = yield
    assert done.output.startswith(("box-1 leads", "box-2 leads"))
    yield
    assert frozen.ready()
    assert "no leader in term" in frozen.log()
    assert frozen.status()["leader_id"] == f.leader.name != "box-3"


@scene("Hand the leadership over")
def hand_over(f: Fleet) -> Steps:
    f.lead("box-1")
    done = yield
    lines = done.output.splitlines()
    assert lines[0].startswith("box-2 leads term ")
    assert lines[1].startswith(("box-1 leads term ", "box-3 leads term "))


@scene("Priorities")
def priorities(f: Fleet) -> Steps:
    yield
    assert f.here.settings["priority"] == 10
    f.lead("box-3")
    box = f.here
    box.settings["cluster"] = {**box.settings["cluster"], "young_steady_seconds": 0.3, "steady_seconds": 0.3}
    box.write_settings()
    box.kill(signal.SIGTERM)
    box.launch()
    f.wait_voters(*VOTERS)
    wait_until(lambda: any(row.get("priority") == 10 for row in f["box-2"].ask("/admin/voters")["voters"]))
    done = yield
    assert {"box-1 priority 10", "box-2 priority 0", "box-3 leads"} == {
        line.strip() for line in done.output.splitlines()
    }
    box.settings["priority"] = 0
    box.write_settings()
    box.kill(signal.SIGTERM)


@scene("Partitions")
def partitions(f: Fleet) -> Steps:
    f.lead("box-1")
    f.signal("box-3", signal.SIGSTOP)
    done = yield
    f.signal("box-3", signal.SIGCONT)
    lines = done.output.splitlines()
    assert lines[0].startswith("box-1 leader term ")
    assert lines[1].startswith("box-2 follower term ")
    assert lines[1].endswith(" leader box-1 | ready")
    assert lines[2] == "a node that does not answer"


@scene("Reading links and voters")
def links_and_voters(f: Fleet) -> Steps:
    f.lead("box-3")
    done = yield
    assert {line.split()[0] for line in done.output.splitlines()[1:4]} == set(VOTERS)
    done = yield
    assert "to box-3 control" in done.output
    assert "from box-3 log" in done.output
    assert "refused: nobody" in done.output
