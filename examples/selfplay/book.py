"""The opening book: what was learnt from self-play, as a table that a person can read.

For every position of the first plies, named by the moves that led to it, the book has how many games the search went on
with each move and how many points (1 a win, half a draw) it got from them. Random opening moves are not counted: the
book repeats the choices of the search that won, so a player with a small budget opens as one with the budget of the
self-play games did; games of shorter searches than its own would teach it little. This is the smallest case of expert
iteration (Anthony, Tian & Barber 2017, "Thinking Fast and Slow with Deep Learning and Tree Search"), with a table in
the place of the network.

A book is rebuilt from the newest games of the store, so it changes as games arrive; `model.json` is one, frozen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ExampleError
from .games import GameRecord

FORMAT = 1
BOOK_PLIES = 8
"""How deep the book goes. Deeper positions are nearly all different, so they are hardly ever met again."""


@dataclass(slots=True)
class MoveCount:
    """`games` in which the search chose a move, and the `points` that its player got from them."""

    games: int = 0
    points: float = 0.0


@dataclass(slots=True, kw_only=True)
class Book:
    """`positions`: the moves so far, joined by spaces -> move -> count. `files` and `games`: what it was built from."""

    game: str
    files: int = 0
    games: int = 0
    positions: dict[str, dict[str, MoveCount]] = field(default_factory=dict)

    @classmethod
    def from_games(cls, game: str, records: Iterable[GameRecord], *, files: int = 0) -> Book:
        """Counts the searched moves among the first `BOOK_PLIES` of each record."""
        book = cls(game=game, files=files)
        for record in records:
            book._add(record)
        return book

    def _add(self, record: GameRecord) -> None:
        self.games += 1
        for ply in range(record.random_plies, min(BOOK_PLIES, len(record.moves))):
            counts = self.positions.setdefault(" ".join(record.moves[:ply]), {})
            count = counts.setdefault(record.moves[ply], MoveCount())
            count.games += 1
            count.points += (record.returns[ply % 2] + 1) / 2

    def choose(self, moves: Sequence[str]) -> str | None:
        """The move to make after `moves`, or None where no search has won anything from here.

        Points, not points per game: a move that the search preferred and won with often is well founded, while one
        lucky game has a perfect average. Even a single game counts, since a move that a longer search chose and won
        with is on average better than the one that a short search would choose now.
        """
        counts = self.positions.get(" ".join(moves), {})
        best = max(counts, key=lambda move: (counts[move].points, move), default=None)
        return best if best is not None and counts[best].points > 0 else None

    def summary(self) -> dict[str, int]:
        """For a result: what the book was built from and how many positions it knows."""
        return {"files": self.files, "games": self.games, "positions": len(self.positions)}

    def to_json(self) -> dict[str, Any]:
        positions = {
            position: {move: [count.games, count.points] for move, count in sorted(counts.items())}
            for position, counts in sorted(self.positions.items())
        }
        return {"format": FORMAT, "game": self.game, "files": self.files, "games": self.games, "positions": positions}

    @classmethod
    def load(cls, path: Path, *, game: str) -> Book:
        """A book from a `model.json`. Raises `ExampleError` if it is not one, or is for another game."""
        try:
            book = cls._from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ExampleError(f"--newest: cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExampleError(f"--newest: {path} is not a model.json of format {FORMAT} ({error!r})") from error
        if book.game != game:
            raise ExampleError(f"--newest: {path} is a book of {book.game}, not of {game}")
        return book

    @classmethod
    def _from_json(cls, fields: Any) -> Book:
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        positions = {
            str(position): {str(move): MoveCount(int(games), float(points)) for move, (games, points) in counts.items()}
            for position, counts in fields["positions"].items()
        }
        return cls(
            game=str(fields["game"]), files=int(fields["files"]), games=int(fields["games"]), positions=positions
        )
