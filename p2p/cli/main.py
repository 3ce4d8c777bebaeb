"""The command line of ``p2pctl``: words -> an order -> lines, or one sentence and a hint on stderr. See `p2p.cli` for
the exit codes.

The token comes from RINGRIFT_CLUSTER_AUTH_TOKEN_FILE, RINGRIFT_CLUSTER_AUTH_TOKEN or ``--token-file``: on a command
line everybody on the machine could read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config.settings import DEFAULT_PORT, SettingsError, read_token
from p2p.cli import orders, show
from p2p.cli.client import Client, CliError, Usage

EPILOG = (
    "exit codes: 0 done; 1 refused or failed, nothing changed; 2 wrong command line; 3 no node reached; "
    "4 outcome unknown. The token is read from --token-file, RINGRIFT_CLUSTER_AUTH_TOKEN_FILE or "
    "RINGRIFT_CLUSTER_AUTH_TOKEN."
)

Told = dict[str, Any]
Order = Callable[[argparse.Namespace], tuple[Told, list[str]]]


def parser() -> argparse.ArgumentParser:
    """The flags that all orders share may stand before or behind the order."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--json", action="store_true", help="print JSON")
    remote = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    remote.add_argument("--url", metavar="URL", help=f"any node (P2P_URL; default http://127.0.0.1:{DEFAULT_PORT})")
    remote.add_argument("--token-file", metavar="FILE", help="file with the cluster's token, readable by you only")
    remote.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="give the node this long to answer")
    both = [shared, remote]
    top = argparse.ArgumentParser(
        "p2pctl", description="Orders to a cluster, through any node.", epilog=EPILOG, parents=both
    )
    words = top.add_subparsers(dest="order", required=True, metavar="ORDER")

    def add(to: Any, name: str, help: str, order: Order, parents: Sequence[argparse.ArgumentParser]) -> Any:
        made = to.add_parser(name, help=help, description=help, parents=parents, epilog=EPILOG)
        made.set_defaults(run=order)
        return made

    add(words, "status", "The nodes: role, state, lag.", _of(orders.status, show.status), both)
    add(words, "leader", "Who leads, in which term, since when.", _of(orders.leader, show.leader), both)
    handing = add(words, "transfer", "Hand the leadership over, and wait until it is.", _transfer, both)
    handing.add_argument("--to", metavar="NODE", help="a voter; by default the one that would inherit")
    voting = words.add_parser("voters", help="Who votes.", description="Who votes.")
    verbs = voting.add_subparsers(dest="verb", required=True, metavar="list|add|remove")
    add(verbs, "list", "The voters and learners as the leader sees them.", _of(orders.voters, show.voters), both)
    for name, help, order in (
        ("add", "Make a member a voter; waits until it has caught up.", orders.add_voter),
        ("remove", "Take a node's vote away; it stays a member.", orders.remove_voter),
    ):
        add(verbs, name, help, _about(order), both).add_argument("node", metavar="NODE")
    mending = add(
        words,
        "recover",
        "On a stopped node: go on alone, as a new cluster, after the majority was lost for good.",
        _recover,
        [shared],
    )
    mending.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="the node's, data/<node-id>")
    mending.add_argument("--node-id", metavar="ID", help="checked against the directory's")
    mending.add_argument("--i-accept-data-loss", action="store_true", help="do it; without, only look")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries one order out and answers the exit code."""
    chosen = parser().parse_args(arguments)
    as_json = getattr(chosen, "json", False)
    try:
        told, lines = chosen.run(chosen)
    except CliError as error:
        if as_json:
            _print(json.dumps({"error": error.sentence, "hint": error.hint, "exit_code": error.code}), sys.stdout)
        _print(f"p2pctl: {error.sentence}", sys.stderr)
        if error.hint:
            _print(f"  {error.hint}", sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    _print(json.dumps(told, indent=2) if as_json else "\n".join(lines), sys.stdout)
    return int(told.get("done") is False)  # `recover` that only looked


def _print(text: str, to: Any) -> None:
    try:
        print(text, file=to, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())  # `p2pctl … | head`: nobody reads on


def _client(chosen: argparse.Namespace) -> Client:
    url = getattr(chosen, "url", None) or os.environ.get("P2P_URL") or f"http://127.0.0.1:{DEFAULT_PORT}"
    try:
        token = read_token(os.environ, getattr(chosen, "token_file", None))
    except SettingsError as error:
        raise Usage(str(error)) from None
    return Client(url, token, getattr(chosen, "timeout", None))


def _of(ask: Callable[[Client], Told], lines: Callable[[Told], list[str]]) -> Order:
    def run(chosen: argparse.Namespace) -> tuple[Told, list[str]]:
        told = ask(_client(chosen))
        return told, lines(told)

    return run


def _about(ask: Callable[[Client, str], Told]) -> Order:
    def run(chosen: argparse.Namespace) -> tuple[Told, list[str]]:
        told = ask(_client(chosen), chosen.node)
        return told, show.voters(told)

    return run


def _transfer(chosen: argparse.Namespace) -> tuple[Told, list[str]]:
    told = orders.transfer(_client(chosen), chosen.to)
    return told, show.transfer(told)


def _recover(chosen: argparse.Namespace) -> tuple[Told, list[str]]:
    from p2p.cli import recover  # needs SQLite and the queue: the other orders start faster without

    told = recover.recover(chosen.data_dir, node=chosen.node_id, accepted=chosen.i_accept_data_loss)
    return told, recover.lines(told)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise ValueError("between 0 and 600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
