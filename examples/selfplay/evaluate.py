"""`evaluate`: is the newest better than the baseline? (the "gauntlet")

The newest player opens from a book of the newest games of the store (or `--newest model.json`) and then searches; the
baseline only searches. They take turns at moving first. With equal budgets the difference is what self-play has taught;
with an empty store both are the same player, and the result says so by `book.games` = 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .book import Book
from .elo import elo_difference, wilson_interval
from .games import load_game, play_game
from .players import BookPlayer, MCTSPlayer, derive_seed
from .report import Report, write_json
from .stop import StopRequest
from .store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """One run of `evaluate`. Simulations are a move's search budget; the book learns from `window` files."""

    game: str
    games: int
    simulations: int
    baseline_simulations: int
    seed: int
    newest: Path | None
    window: int
    store: Path
    folder: Path


def newest_book(game: str, *, store: Path, window: int) -> Book:
    """The book of the `window` newest files of `store`; says on stdout what it found."""
    records, files, skipped = Store(store).records(game, window)
    book = Book.from_games(game, records, files=files)
    print(f"book: {book.games} games of {game} from {files} files in {store}", flush=True)
    if skipped:
        print(f"book: skipped {skipped} files that are not games of {game}", flush=True)
    if not book.games:
        print("book: empty, so a book player plays as plain MCTS does", flush=True)
    return book


def run(options: EvaluateOptions, stop: StopRequest) -> None:
    """Plays the match, leaves the book it used as `model.json` beside the result. Raises `Stopped`, `ExampleError`."""
    game = load_game(options.game)
    if options.newest is not None:
        book = Book.load(options.newest, game=options.game)
    else:
        book = newest_book(options.game, store=options.store, window=options.window)
    write_json(options.folder / "model.json", book.to_json())
    tally: Counter[str] = Counter(wins=0, draws=0, losses=0, moves=0, book_moves=0)
    with Report(options.folder, kind="evaluation", game=options.game, total=options.games, stop=stop) as report:
        for index in range(options.games):
            sentence = _one_game(game, book, options, index, tally, stop)
            report.advance(sentence, tally)
    result = _result(options, book, tally, seconds=report.seconds)
    low, high = result["score_interval"]
    report.finish(
        result,
        f"the newest scores {result['score']:.2f} ({low:.2f} to {high:.2f}), "
        f"{result['elo_difference']:+.0f} ± {result['elo_error']:.0f} Elo",
    )


def _one_game(
    game: Any, book: Book, options: EvaluateOptions, index: int, tally: Counter[str], stop: StopRequest
) -> str:
    """Plays game `index` (the newest moves first in the even ones), counts it, gives the line for the log."""
    seed = derive_seed(options.seed, options.game, index)
    search = MCTSPlayer(game, simulations=options.simulations, seed=derive_seed(seed, "newest"))
    newest = BookPlayer(book, search)
    baseline = MCTSPlayer(game, simulations=options.baseline_simulations, seed=derive_seed(seed, "baseline"))
    seat = index % 2
    record = play_game(
        game,
        (newest, baseline) if seat == 0 else (baseline, newest),
        name=options.game,
        simulations=options.simulations,
        seed=seed,
        stop=stop,
    )
    outcome = {1: "wins", 0: "draws", -1: "losses"}[round(record.returns[seat])]
    tally.update({outcome: 1, "moves": len(record.moves), "book_moves": newest.book_moves})
    side = "moving first" if seat == 0 else "moving second"
    word = {"wins": "the newest wins", "draws": "draw", "losses": "the newest loses"}[outcome]
    return f"{word}, {side}, in {len(record.moves)} moves"


def _result(options: EvaluateOptions, book: Book, tally: Counter[str], *, seconds: float) -> dict[str, Any]:
    points = tally["wins"] + tally["draws"] / 2
    low, high = wilson_interval(points, options.games)
    elo, elo_low, elo_high = elo_difference(points, options.games)
    return {
        "kind": "evaluation",
        "game": options.game,
        "games": options.games,
        **tally,
        "score": round(points / options.games, 4),
        "score_interval": [round(low, 4), round(high, 4)],
        "elo_difference": round(elo, 1),
        "elo_error": round((elo_high - elo_low) / 2, 1),
        "elo_interval": [round(elo_low, 1), round(elo_high, 1)],
        "simulations": options.simulations,
        "baseline_simulations": options.baseline_simulations,
        "seed": options.seed,
        "seconds": seconds,
        "book": book.summary(),
        "model": "model.json",
    }
