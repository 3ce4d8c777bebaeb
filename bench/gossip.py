"""How soon is a death known, how often is a living member slandered, and what does it cost, at 30, 300, 1,000 members?

The real membership core on the simulator's virtual clock (0.5 to 3 ms each way), so the figures are the protocol's and
not this machine's. *Detection*: members are killed one by one, silently. *Slander*: 5 % of the members stand still for
1 to 5 s again and again, each time as they send a question; counted are healthy members suspected or declared dead, and
sleepers declared dead, with Lifeguard and without (plain SWIM with suspicion). *Traffic*: message bodies as encoded,
idle and with every member announcing something once a minute. The last column is PROTOCOL §4's.

Usage: python -m bench.gossip [--members 30,300,1000] [--processes 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bench.harness import machine, quantile, report
from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.core import MembershipCore
from p2p.membership.events import Answered, Changed, Effect, JoinThrough, Send, SetMeta, Tick
from p2p.membership.figures import Figures
from p2p.membership.hint import NO_LEADER
from p2p.membership.member import Member, Meta, State, first_record
from p2p.membership.message import FullState, Message, Ping, Welcome
from p2p.membership.simulated import Network, Watch

SLOW_SHARE = 0.05
SETTLE_SECONDS = 40.0

# members -> (deaths, seconds between them, virtual seconds of slander, of traffic): about a minute of one core each
EFFORT = {30: (120, 8.0, 1_800.0, 120.0), 300: (30, 6.0, 75.0, 10.0), 1_000: (12, 4.0, 15.0, 5.0)}
PUBLISHED = {
    30: {"first probe": "0.69 / 4.4", "known everywhere": "8.5", "exchanges": "2"},
    300: {"first probe": "0.74 / 4.9", "known everywhere": "13", "exchanges": "2"},
    1_000: {"first probe": "0.70 / 4.8", "known everywhere": "15", "exchanges": "2"},
}


def cluster(members: int, seed: int, watch: Watch | None = None, *, lifeguard: bool = True) -> Network:
    """All of them know each other already."""
    net = Network(random.Random(seed), watch=watch)
    figures = Figures(story_entries=16, lifeguard=lifeguard)
    records = [_record(n) for n in range(members)]
    for n, record in enumerate(records):
        core = MembershipCore(record, random.Random(seed * 100_003 + n), 0.0, figures)
        (join,) = core.step(JoinThrough(("seed:1",), 0), 0.0)
        assert isinstance(join, Send)
        welcome = Welcome(FullState((*records[:n], *records[n + 1 :])))
        core.step(
            Answered(join.id, Message(NodeId("seed"), "boot", ClusterId("c1"), None, NO_LEADER, (), welcome)), 0.0
        )
        net.add(core)
        net.tell(core.node, Tick())
    net.run(SETTLE_SECONDS)
    return net


def _record(n: int) -> Member:
    meta: Meta = {"version": "0.1.0", "role": "worker", "priority": 0, "caps": "0f3a9c", "running_jobs": 3, "zone": "a"}
    address = f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8770"
    node, disk, boot = NodeId(f"gpu-box-{n:04}"), DiskId(f"{n:032x}"), f"{n:016x}"
    return first_record(
        node, disk, boot, started_ms=1_700_000_000_000, address=address, cluster=ClusterId("c1"), meta=meta
    )


@dataclass
class Death:
    """When the others took note of one, in virtual seconds."""

    at: float
    probed: float | None = None
    suspected: float | None = None
    declared: list[float] = field(default_factory=list)


def detection(members: int, deaths: int, gap: float) -> dict[str, Any]:
    """Seconds from a silent death to the first probe, the first suspicion, the first verdict, and everybody's."""
    seen: dict[NodeId, Death] = {}
    complete: list[Death] = []
    missed = 0
    seed = 0
    while len(complete) + missed < deaths:
        seed += 1
        seen.clear()
        net = cluster(members, seed, lambda node, effect, now: _note(seen, effect, now))
        draw = random.Random(seed)
        for node in draw.sample(sorted(net.hosts), min(max(members // 10, 1), deaths - len(complete) - missed)):
            seen[node] = Death(net.now)
            net.kill(node)
            net.run(net.now + gap)
        net.run(net.now + 60.0)
        living = sum(host.alive for host in net.hosts.values())
        done = [death for death in seen.values() if len(death.declared) >= living]
        missed += len(seen) - len(done)
        complete += done
    return {
        "deaths": len(complete),
        "missed": missed,
        "first_probe": _spread([d.probed - d.at for d in complete if d.probed is not None]),
        "first_suspicion": _spread([d.suspected - d.at for d in complete if d.suspected is not None]),
        "first_verdict": _spread([min(d.declared) - d.at for d in complete]),
        "known_everywhere": _spread([max(d.declared) - d.at for d in complete]),
    }


def _note(seen: dict[NodeId, Death], effect: Effect, now: float) -> None:
    match effect:
        case Send(to_node=str() as node, message=Message(body=Ping())) if node in seen:
            death = seen[NodeId(node)]
            death.probed = now if death.probed is None else death.probed
        case Changed(member) if member.node in seen and member.state is State.SUSPECT:
            death = seen[member.node]
            death.suspected = now if death.suspected is None else death.suspected
        case Changed(member) if member.node in seen and member.state is State.DEAD:
            seen[member.node].declared.append(now)


def _spread(seconds: list[float]) -> list[float]:
    return [round(quantile(seconds, share), 2) for share in (0.5, 0.99)] if seconds else []


def slander(members: int, seconds: float, *, lifeguard: bool) -> dict[str, Any]:
    """False rumours and false deaths, by whom they are about. A rumour counts once, where it begins."""
    slow: set[NodeId] = set()
    begun: set[tuple[NodeId, int]] = set()  # (member, incarnation) of rumours
    buried: set[tuple[NodeId, int]] = set()

    def watch(node: NodeId, effect: Effect, now: float) -> None:
        if now > SETTLE_SECONDS and isinstance(effect, Changed) and effect.member.state is not State.ALIVE:
            (buried if effect.member.state is State.DEAD else begun).add(
                (effect.member.node, effect.member.incarnation)
            )

    net = cluster(members, 1, watch, lifeguard=lifeguard)
    draw = random.Random(2)
    for node in draw.sample(sorted(net.hosts), max(round(members * SLOW_SHARE), 1)):
        slow.add(node)
        net.disturb(node, lambda: (draw.uniform(1.0, 5.0), draw.uniform(1.0, 5.0)))
    net.run(net.now + seconds)
    return {
        "minutes": round(seconds / 60, 1),
        "slow": len(slow),
        "healthy_suspected": sum(node not in slow for node, _ in begun),
        "healthy_declared_dead": sum(node not in slow for node, _ in buried),
        "slow_suspected": sum(node in slow for node, _ in begun),
        "slow_declared_dead": sum(node in slow for node, _ in buried),
    }


def traffic(members: int, seconds: float) -> dict[str, Any]:
    """Messages (requests and replies) and bytes sent by each member each second; bodies only."""
    net = cluster(members, 1)
    net.count_bytes = True
    result = {}
    for name in ("idle", "churn"):
        if name == "churn":
            for n, node in enumerate(sorted(net.hosts)):
                _announce_each_minute(net, node, net.now + 60.0 * n / members)
        net.counted.clear()
        net.run(net.now + seconds)
        result[name] = {
            "messages": round(net.counted["messages"] / members / seconds, 2),
            "bytes": round(net.counted["bytes"] / members / seconds, 1),
        }
    return result


def _announce_each_minute(net: Network, node: NodeId, at: float) -> None:
    def announce() -> None:
        meta = {**net.hosts[node].core.me.meta, "running_jobs": int(net.now)}
        net.tell(node, SetMeta(meta))
        _announce_each_minute(net, node, net.now + 60.0)

    net.at(at, announce)


def measure(members: int) -> dict[str, Any]:
    """Everything at one size."""
    began = time.process_time()
    nearest = min(EFFORT, key=lambda size: abs(size - members))
    deaths, gap, seconds, traffic_seconds = EFFORT[nearest]
    return {
        "members": members,
        "detection": detection(members, deaths, gap),
        "lifeguard": slander(members, seconds, lifeguard=True),
        "plain": slander(members, seconds, lifeguard=False),
        "traffic": traffic(members, traffic_seconds),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of one size."""
    members, found = result["members"], result["detection"]
    published = PUBLISHED.get(members, {})
    lines = [
        (f"{members} members", f"{'measured':<30}PROTOCOL §4"),
        ("first probe of the dead, p50 / p99 s", _pair(found["first_probe"], published.get("first probe", ""))),
        ("first suspicion, p50 / p99 s", _pair(found["first_suspicion"], "")),
        ("first verdict, p50 / p99 s", _pair(found["first_verdict"], "")),
        ("known everywhere, p50 / p99 s", _pair(found["known_everywhere"], published.get("known everywhere", ""))),
        ("deaths, of which somebody missed", f"{found['deaths'] + found['missed']}, {found['missed']}"),
    ]
    for name in ("lifeguard", "plain"):
        told = result[name]
        lines += [
            (
                f"{told['slow']} sleepers, {told['minutes']} min, {name}: the healthy",
                f"{told['healthy_suspected']} suspected, {told['healthy_declared_dead']} declared dead",
            ),
            ("  the sleepers", f"{told['slow_suspected']} suspected, {told['slow_declared_dead']} declared dead"),
        ]
    for name in ("idle", "churn"):
        cost = result["traffic"][name]
        value = f"{cost['messages']} messages/s, {cost['bytes']} B/s"
        lines.append((f"each member {name}", f"{value:<30}{published.get('exchanges', '') if name == 'idle' else ''}"))
    return [*lines, ("took", f"{result['cpu_seconds']} s of CPU time"), ("", "")]


def _pair(values: list[float], published: str) -> str:
    return f"{' / '.join(map(str, values)):<30}{published}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", default="30,300,1000", help="sizes, separated by commas")
    parser.add_argument("--processes", type=int, default=1, help="sizes measured side by side")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    sizes = [int(size) for size in options.members.split(",")]
    if options.processes > 1:
        with ProcessPoolExecutor(options.processes) as pool:
            results = list(pool.map(measure, sorted(sizes, reverse=True)))
    else:
        results = [measure(size) for size in sizes]
    results.sort(key=lambda result: int(result["members"]))
    line = {"bench": "gossip", "machine": machine(), "sizes": results}
    if options.json:
        print(json.dumps(line))
    else:
        report("gossip: the real core on a virtual clock", [row for result in results for row in rows(result)], line)


if __name__ == "__main__":
    main()
