"""Boxes with a network between them that a test can break: one network namespace each, and between them a switch of our
own, in a process of its own, which delays, loses, reorders and cuts by direction.

Not ``tc``: the kernels that CI runs on often lack netem and the drop action, and a cut there cannot be told for one
direction of one pair. Every namespace has a TUN device whose other end the switch holds, so every packet passes through
this file. Needs root, iproute2 and /dev/net/tun.

    python -m tests.cluster.netns NAME=ADDRESS…      the switch itself; orders are JSON lines on its standard input
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.nodes import QUICK, ROOT, ClusterProcesses, NodeProcess

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SUBNET = "10.213.{n}"
HERE = "tests"  # the namespace of the test itself: never cut
TOKEN = "a-token-of-the-namespace-tests"
MAX_PACKET = 65_536


def why_not() -> str:
    """Why this machine cannot do it; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    name = f"p2p-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no namespace can be made: {tried.stderr.strip()}" if tried.returncode else ""


# -- the switch: runs in a process of its own ----------------------------------------------------------------------


class Switch:
    """Passes IPv4 packets between TUN devices by destination address."""

    def __init__(self, ends: dict[str, tuple[str, int]]) -> None:
        self._fds = {name: fd for name, (_, fd) in ends.items()}
        self._names = {bytes(map(int, address.split("."))): name for name, (address, _) in ends.items()}
        self._cut: set[tuple[str, str]] = set()
        self._delay, self._jitter, self._loss, self._reorder = 0.0, 0.0, 0.0, False
        self._late: list[tuple[float, int, int, bytes]] = []
        self._newest: dict[
            tuple[str, str], float
        ] = {}  # when the last packet of a pair is due: TCP wants them in order
        self._count = 0
        self._rng = random.Random(1)
        self._selector = selectors.DefaultSelector()
        for name, fd in self._fds.items():
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, name)
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        self._orders = b""

    def run(self) -> None:
        while True:
            patience = max(self._late[0][0] - time.monotonic(), 0.0) if self._late else None
            for key, _ in self._selector.select(patience):
                if key.data is None:
                    if not self._listen():
                        return
                else:
                    self._take(key.fd, key.data)
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, fd, packet = heapq.heappop(self._late)
                self._give(fd, packet)

    def _listen(self) -> bool:
        read = os.read(0, 65_536)
        self._orders += read
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            order = json.loads(line)
            self._cut = {(a, b) for a, b in order["cut"]}
            self._delay, self._jitter, self._loss = order["delay"], order["jitter"], order["loss"]
            self._reorder = order["reorder"]
            print("done", flush=True)
        return bool(read)

    def _take(self, fd: int, source: str) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(fd, MAX_PACKET)
                target = self._names.get(packet[16:20])
                if packet[0] >> 4 == 4 and target is not None and (source, target) not in self._cut:
                    self._send(source, target, packet)

    def _send(self, source: str, target: str, packet: bytes) -> None:
        shaped = HERE not in (source, target)
        if shaped and self._loss and self._rng.random() < self._loss:
            return
        if not shaped or not (self._delay or self._jitter):
            self._give(self._fds[target], packet)
            return
        due = time.monotonic() + self._delay + self._jitter * self._rng.random()
        if not self._reorder:
            due = self._newest[source, target] = max(due, self._newest.get((source, target), 0.0))
        self._count += 1
        heapq.heappush(self._late, (due, self._count, self._fds[target], packet))

    @staticmethod
    def _give(fd: int, packet: bytes) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(fd, packet)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _main(ends: Sequence[str]) -> None:
    """Makes the devices, says ``ready``, and switches until its input ends. The devices end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(-10)  # a network does not get slower because the machines at its ends are busy
    made = {}
    for number, end in enumerate(ends):
        name, namespace, address = end.split(",")
        device = f"p2p{os.getpid() % 100_000}-{number}"
        made[name] = (address, _tun(device))
        within: tuple[str, ...] = ()
        if namespace:
            _ip("link", "set", device, "netns", namespace)
            within = ("-n", namespace)
            _ip(*within, "link", "set", "lo", "up")
        _ip(*within, "link", "set", device, "mtu", "1500")
        _ip(*within, "addr", "add", f"{address}/24", "dev", device)
        _ip(*within, "link", "set", device, "up")
    print("ready", flush=True)
    Switch(made).run()


# -- what tests use ------------------------------------------------------------------------------------------------


class Net:
    """Namespaces for these nodes and the switch between them. `close` leaves nothing behind."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        tag = f"{os.getpid()}"
        base = SUBNET.format(n=os.getpid() % 250 + 1)
        self.namespaces = {name: f"p2p-{tag}-{name}" for name in names}
        self.addresses = {name: f"{base}.{n + 11}" for n, name in enumerate(names)}
        self._state: dict[str, Any] = {"cut": [], "delay": 0.0, "jitter": 0.0, "loss": 0.0, "reorder": False}
        self._switch: subprocess.Popen[str] | None = None
        try:
            for namespace in self.namespaces.values():
                _ip("netns", "add", namespace)
            ends = [f"{name},{self.namespaces[name]},{self.addresses[name]}" for name in names]
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.netns", f"{HERE},,{base}.1", *ends],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            assert self._switch.stdout is not None
            assert self._switch.stdout.readline() == "ready\n", "the switch did not start"
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._switch is not None:
            assert self._switch.stdin is not None and self._switch.stdout is not None
            self._switch.stdin.close()
            self._switch.wait(10)
            self._switch.stdout.close()
        for namespace in self.namespaces.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def prefix(self, name: str) -> list[str]:
        """What a command begins with that is to run in this node's namespace."""
        return ["ip", "netns", "exec", self.namespaces[name]]

    def _order(self, **change: Any) -> None:
        self._state.update(change)
        assert self._switch is not None and self._switch.stdin is not None and self._switch.stdout is not None
        self._switch.stdin.write(json.dumps(self._state) + "\n")
        self._switch.stdin.flush()
        assert self._switch.stdout.readline() == "done\n", "the switch has died"

    def shape(self, *, delay: float = 0.0, jitter: float = 0.0, loss: float = 0.0, reorder: bool = False) -> None:
        """Of every packet between nodes, one way: seconds, up to so many more, the share that is lost."""
        self._order(delay=delay, jitter=jitter, loss=loss, reorder=reorder)

    def cut(self, *pairs: tuple[str, str]) -> None:
        """From now on nothing passes from the first to the second of each pair; all else does."""
        self._order(cut=[list(pair) for pair in pairs])

    def split(self, *groups: Iterable[str]) -> None:
        """Only those that are in one group hear each other; a node may be in two."""
        together = {(a, b) for group in map(list, groups) for a in group for b in group}
        names = list(self.namespaces)
        self.cut(*[(a, b) for a in names for b in names if a != b and (a, b) not in together])

    def heal(self) -> None:
        """All hear all, at once."""
        self._order(cut=[], delay=0.0, jitter=0.0, loss=0.0, reorder=False)


@contextlib.contextmanager
def networked(
    folder: Path, n: int = 3, *, settings: dict[str, Any] | None = None
) -> Iterator[tuple[ClusterProcesses, Net]]:
    """A cluster of `n` nodes, each in a namespace of its own, not started."""
    net = Net([f"n{i + 1}" for i in range(n)])
    cluster = ClusterProcesses(folder, 0, settings=settings or QUICK)
    cluster.token = TOKEN
    file = folder / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    for name, address in net.addresses.items():
        node: NodeProcess = cluster.make(name, host=address, prefix=net.prefix(name))
        node.port = 8770
        node.flags += ["--auth-token-file", str(file), "--advertise", node.address]
    for node in cluster.all:
        node.flags += ["--peers", cluster.peers()]
    try:
        yield cluster, net
    finally:
        cluster.destroy()
        net.close()


if __name__ == "__main__":
    _main(sys.argv[1:])
