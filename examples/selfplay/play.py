"""`play`: MCTS against itself, and the games to the store.

The games of a run depend on its flags alone: game number i has a seed derived from `--seed` and i. So a retried attempt
gives the same games, and a run may be checked by repeating it. To make games differ, the first few moves of each (none
to `--opening-plies`, drawn by lot) are random; that is also how the book gets answers to moves that MCTS does not make.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .games import GameRecord, load_game, play_game
from .players import MCTSPlayer, derive_seed
from .report import Report
from .stop import StopRequest
from .store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayOptions:
    """One run of `play`. `simulations` are a move's search budget; `out` is where the games file goes."""

    game: str
    games: int
    simulations: int
    opening_plies: int
    seed: int
    out: Path | None
    store: Path
    folder: Path


def run(options: PlayOptions, stop: StopRequest) -> None:
    """Plays, writes `games.jsonl` line by line, publishes it when all games are played. Raises `Stopped`."""
    game = load_game(options.game)
    path = (options.out or options.folder / "games") / "games.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    tally: Counter[str] = Counter(first_player_wins=0, second_player_wins=0, draws=0, moves=0)
    with (
        Report(options.folder, kind="selfplay", game=options.game, total=options.games, stop=stop) as report,
        path.open("w", encoding="utf-8") as lines,
    ):
        for index in range(options.games):
            record = _one_game(game, options, index, stop)
            lines.write(json.dumps(record.to_json()) + "\n")
            lines.flush()
            outcome = _outcome(record)
            tally.update({outcome: 1, "moves": len(record.moves)})
            report.advance(f"{_WORDS[outcome]} in {len(record.moves)} moves ({record.seconds:.2f} s)", tally)
    # Published only now: half of a run, published by an attempt that was stopped, would be counted again by its retry.
    published = Store(options.store).publish(options.game, path, _file_name(options))
    result = _result(options, tally, seconds=report.seconds, files=[_relative(path, options.folder)])
    report.finish({**result, "published": str(published)}, _summary(tally, options.games))


def _one_game(game: Any, options: PlayOptions, index: int, stop: StopRequest) -> GameRecord:
    seed = derive_seed(options.seed, options.game, index)
    first, second = (MCTSPlayer(game, simulations=options.simulations, seed=derive_seed(seed, seat)) for seat in (0, 1))
    return play_game(
        game,
        (first, second),
        name=options.game,
        simulations=options.simulations,
        seed=seed,
        stop=stop,
        random_plies=random.Random(derive_seed(seed, "plies")).randint(0, options.opening_plies),
    )


_WORDS = {"first_player_wins": "first player wins", "second_player_wins": "second player wins", "draws": "draw"}


def _outcome(record: GameRecord) -> str:
    if record.returns[0] == record.returns[1]:
        return "draws"
    return "first_player_wins" if record.returns[0] > record.returns[1] else "second_player_wins"


def _file_name(options: PlayOptions) -> str:
    plies, games, simulations = options.opening_plies, options.games, options.simulations
    return f"seed{options.seed}-games{games}-simulations{simulations}-plies{plies}.jsonl"


def _relative(path: Path, folder: Path) -> str:
    """Within the job's folder a relative path, since the folder is reached by other names from other machines."""
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _result(options: PlayOptions, tally: Counter[str], *, seconds: float, files: list[str]) -> dict[str, Any]:
    return {
        "kind": "selfplay",
        "game": options.game,
        "games": options.games,
        **tally,
        "mean_length": round(tally["moves"] / options.games, 2),
        "simulations": options.simulations,
        "opening_plies": options.opening_plies,
        "seed": options.seed,
        "seconds": seconds,
        "files": files,
    }


def _summary(tally: Counter[str], games: int) -> str:
    return (
        f"first player {tally['first_player_wins']}, second player {tally['second_player_wins']}, "
        f"draws {tally['draws']}, {tally['moves'] / games:.1f} moves a game"
    )
