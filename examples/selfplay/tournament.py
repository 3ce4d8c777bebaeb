"""`tournament`: every player against every other, both colours, one table of Elo ratings.

A round is two games of each pairing. Rounds are played one after another, so that a tournament that is stopped early
has treated all players alike. The ratings are in `elo`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from .book import Book
from .elo import rate
from .evaluate import newest_book
from .games import load_game, play_game
from .players import PlayerSpec, derive_seed
from .report import Report
from .stop import StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TournamentOptions:
    """One run of `tournament`. `window` is how many files of the store a `book` player learns from."""

    game: str
    players: tuple[PlayerSpec, ...]
    rounds: int
    seed: int
    window: int
    store: Path
    folder: Path

    @property
    def games(self) -> int:
        """Two games for each pairing and round."""
        return self.rounds * len(self.players) * (len(self.players) - 1)


@dataclass(slots=True)
class Standings:
    """`[wins, draws, losses]` of each player against each other one, both colours together."""

    results: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, first: str, second: str, returned: float) -> None:
        """Counts a game; `returned` is the first player's 1, 0 or -1."""
        column = 1 - round(returned)
        self.results.setdefault((first, second), [0, 0, 0])[column] += 1
        self.results.setdefault((second, first), [0, 0, 0])[2 - column] += 1

    def total(self, player: str) -> list[int]:
        rows = [row for (name, _other), row in self.results.items() if name == player]
        return [sum(column) for column in zip(*rows, strict=True)]

    def table(self) -> dict[str, float]:
        """Points of each player so far, for whoever watches."""
        table: dict[str, float] = {}
        for (player, _other), points in self.points().items():
            table[player] = table.get(player, 0.0) + points
        return table

    def points(self) -> dict[tuple[str, str], float]:
        return {pair: wins + draws / 2 for pair, (wins, draws, _losses) in self.results.items()}


def run(options: TournamentOptions, stop: StopRequest) -> None:
    """Plays all rounds and rates the players. Raises `Stopped`, `ExampleError`."""
    game = load_game(options.game)
    book = Book(game=options.game)
    if any(player.kind == "book" for player in options.players):
        book = newest_book(options.game, store=options.store, window=options.window)
    standings = Standings()
    with Report(options.folder, kind="tournament", game=options.game, total=options.games, stop=stop) as report:
        for turn in range(options.rounds):
            for first, second in permutations(options.players, 2):
                returned = _one_game(game, (first, second), book, options, turn, stop)
                standings.add(first.name, second.name, returned)
                winner = {1: f"{first.name} wins", 0: "draw", -1: f"{second.name} wins"}[round(returned)]
                tally = {"round": turn + 1, "rounds": options.rounds, "points": standings.table()}
                report.advance(f"{first.name} - {second.name}: {winner}", tally)
    result = _result(options, book, standings, seconds=report.seconds)
    for row in result["table"]:
        print("{player:>12} {elo:7.0f} ± {error:<4.0f} +{wins} ={draws} -{losses}".format_map(row), flush=True)
    report.finish(result, f"{result['table'][0]['player']} leads")


def _one_game(
    game: Any,
    pairing: tuple[PlayerSpec, PlayerSpec],
    book: Book,
    options: TournamentOptions,
    turn: int,
    stop: StopRequest,
) -> float:
    """The first player's result. The seed is of the pairing and round, so adding a player changes no other game."""
    first, second = pairing
    seed = derive_seed(options.seed, options.game, turn, first.name, second.name)
    record = play_game(
        game,
        (
            first.create(game, seed=derive_seed(seed, 0), book=book),
            second.create(game, seed=derive_seed(seed, 1), book=book),
        ),
        name=options.game,
        simulations=max(first.simulations, second.simulations),
        seed=seed,
        stop=stop,
    )
    return record.returns[0]


def _result(options: TournamentOptions, book: Book, standings: Standings, *, seconds: float) -> dict[str, Any]:
    names = [player.name for player in options.players]
    ratings = rate(names, standings.points())
    table = []
    for name in sorted(names, key=lambda name: -ratings[name].elo):
        wins, draws, losses = standings.total(name)
        table.append(
            {
                "player": name,
                "elo": round(ratings[name].elo, 1),
                "error": round(ratings[name].error, 1),
                "games": wins + draws + losses,
                "wins": wins,
                "draws": draws,
                "losses": losses,
            }
        )
    pairings = [
        {"player": a, "opponent": b, "wins": wins, "draws": draws, "losses": losses}
        for (a, b), (wins, draws, losses) in sorted(standings.results.items())
        if names.index(a) < names.index(b)
    ]
    return {
        "kind": "tournament",
        "game": options.game,
        "games": options.games,
        "rounds": options.rounds,
        "seed": options.seed,
        "seconds": seconds,
        "book": book.summary(),
        "table": table,
        "pairings": pairings,
    }
