"""`python -m examples.selfplay play | evaluate | tournament`: flags in, exit code out.

Decides what a flag may be and turns every failure into one sentence on stderr, which is what the orchestrator shows as
the job's error. What the steps do is in the modules named after them.
"""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import evaluate, play, tournament
from .errors import ExampleError, Stopped
from .games import GAMES
from .players import MAX_SIMULATIONS, PlayerSpec, parse_player
from .report import default_seed, job_folder
from .stop import StopRequest, stop_on_signals
from .store import default_store

MAX_GAMES = 100_000
MAX_PLAYERS = 16
MAX_SEED = 2**63 - 1
EPILOG = """\
A step writes progress.json and result.json to $P2P_JOB_DIR, or to a new temporary folder which it names at the end.
Exit codes: 0 done, 2 refused (one sentence on stderr says why), 143 stopped by SIGTERM.

examples:
  python -m examples.selfplay play --game connect_four --games 20 --simulations 100
  python -m examples.selfplay evaluate --game connect_four --games 20 --simulations 50
  python -m examples.selfplay tournament --game hex5 --players mcts25,mcts100,random,book100 --rounds 3
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line: argparse's usage text would fill the few lines of stderr that the user is shown."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A flag's type: an int between `least` and `most`, both included."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be between {least} and {most}, not {value}")
        return value

    return convert


def game_name(text: str) -> str:
    if text in GAMES:
        return text
    near = difflib.get_close_matches(text, GAMES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise argparse.ArgumentTypeError(f"there is no game {text!r}{hint}; choose from {', '.join(GAMES)}")


def player_list(text: str) -> tuple[PlayerSpec, ...]:
    """`mcts25,random` as players: two to `MAX_PLAYERS` of them, all different."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not 2 <= len(names) <= MAX_PLAYERS:
        raise argparse.ArgumentTypeError(f"name 2 to {MAX_PLAYERS} players, separated by commas, not {len(names)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"a player is named twice in {text!r}")
    try:
        return tuple(parse_player(name) for name in names)
    except ExampleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="selfplay",
        description="Self-play, evaluation and tournaments of small board games, as jobs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    simulations = whole_number(1, MAX_SIMULATIONS)

    step = _add_step(steps, "play", "MCTS plays itself; the games go to the store", games=20)
    step.add_argument("--simulations", type=simulations, default=100, metavar="S", help="search a move (100)")
    step.add_argument(
        "--opening-plies",
        type=whole_number(0, 20),
        default=3,
        metavar="P",
        help="at most this many random first moves, so that games differ (3)",
    )
    step.add_argument("--out", type=Path, metavar="DIR", help="where games.jsonl goes (games/ in the job's folder)")

    step = _add_step(steps, "evaluate", "the newest opening book against plain MCTS", games=20)
    step.add_argument("--simulations", type=simulations, default=100, metavar="S", help="the newest's search (100)")
    step.add_argument(
        "--baseline-simulations", type=simulations, metavar="B", help="the baseline's search (as --simulations)"
    )
    step.add_argument(
        "--newest", type=Path, metavar="FILE", help="a model.json to evaluate, instead of the store's games"
    )
    _add_window(step)

    step = _add_step(steps, "tournament", "a round robin with Elo ratings", games=None)
    step.add_argument(
        "--players", type=player_list, default="random,mcts25,mcts100,book100", metavar="A,B,…", help="(%(default)s)"
    )
    step.add_argument("--rounds", type=whole_number(1, 10_000), default=3, metavar="R", help="two games a pairing (3)")
    _add_window(step)
    return parser


def _add_step(
    steps: argparse._SubParsersAction[_Parser], name: str, summary: str, *, games: int | None
) -> argparse.ArgumentParser:
    """A step with the flags that all have."""
    step = steps.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    step.add_argument("--game", type=game_name, default="connect_four", metavar="G", help=f"{' or '.join(GAMES)}")
    if games is not None:
        step.add_argument("--games", type=whole_number(1, MAX_GAMES), default=games, metavar="N", help=f"({games})")
    step.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        metavar="K",
        help="the same seed gives the same games (by default from $P2P_JOB_ID)",
    )
    step.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="where steps share games ($SELFPLAY_STORE, else in the user's data folder)",
    )
    return step


def _add_window(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--window", type=whole_number(1, 200), default=100, metavar="F", help="newest game files in the book (100)"
    )


def run_step(args: argparse.Namespace, stop: StopRequest) -> None:
    folder = job_folder()
    store = args.store if args.store is not None else default_store()
    seed = args.seed if args.seed is not None else default_seed()
    if args.step == "play":
        play.run(
            play.PlayOptions(
                game=args.game,
                games=args.games,
                simulations=args.simulations,
                opening_plies=args.opening_plies,
                seed=seed,
                out=args.out,
                store=store,
                folder=folder,
            ),
            stop,
        )
    elif args.step == "evaluate":
        evaluate.run(
            evaluate.EvaluateOptions(
                game=args.game,
                games=args.games,
                simulations=args.simulations,
                baseline_simulations=args.baseline_simulations or args.simulations,
                seed=seed,
                newest=args.newest,
                window=args.window,
                store=store,
                folder=folder,
            ),
            stop,
        )
    else:
        tournament.run(
            tournament.TournamentOptions(
                game=args.game,
                players=args.players,
                rounds=args.rounds,
                seed=seed,
                window=args.window,
                store=store,
                folder=folder,
            ),
            stop,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one step and gives its exit code. A wrong flag or `--help` raises `SystemExit`, as argparse does."""
    with stop_on_signals() as stop:
        args = build_parser().parse_args(argv)
        try:
            run_step(args, stop)
        except ExampleError as error:
            print(f"selfplay {args.step}: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            what = f"cannot use {error.filename}: {error.strerror}" if error.filename else f"cannot write: {error}"
            print(f"selfplay {args.step}: {what}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            name = signal.Signals(stopped.signum).name
            print(f"selfplay {args.step}: stopped by {name}; a retry starts afresh", file=sys.stderr)
            return 128 + stopped.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
