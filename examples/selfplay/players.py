"""Who plays: `random`, `mcts100`, `book100`.

A `PlayerSpec` is the name of a strength; `create` makes the player for one game from a seed, so that a game depends on
its seed alone and not on the games before it. MCTS is OpenSpiel's C++ bot with random playouts (Kocsis & Szepesvári
2006, UCT; Winands et al. 2008, the solver), about 4 microseconds a simulation on these boards.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .book import Book
from .errors import ExampleError
from .games import Player, legal_moves, load_pyspiel

MAX_SIMULATIONS = 1_000_000
TREE_MEMORY_MB = 256
"""The search tree's limit; OpenSpiel prunes it there. A move of 100,000 simulations takes about 16 MB."""

_NAME = re.compile(r"(?P<kind>mcts|book)(?P<simulations>[0-9]{1,7})|(?P<random>random)")


def derive_seed(seed: int, *parts: object) -> int:
    """A seed of 31 bits (OpenSpiel's C++ int) for one part of a run: the same parts give the same seed, anywhere."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayerSpec:
    """A strength: `kind` is random, mcts or book; `simulations` is the search budget of a move, 0 for random."""

    name: str
    kind: str
    simulations: int

    def create(self, game: Any, *, seed: int, book: Book) -> Player:
        """The player for one game. Only a `book` player looks at `book`."""
        if self.kind == "random":
            return RandomPlayer(seed)
        search = MCTSPlayer(game, simulations=self.simulations, seed=seed)
        return BookPlayer(book, search) if self.kind == "book" else search


def parse_player(name: str) -> PlayerSpec:
    """`mcts100` -> MCTS of 100 simulations a move. Raises `ExampleError`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ExampleError(f"there is no player {name!r}; write random, mcts100 or book100 (100 simulations a move)")
    if match["random"]:
        return PlayerSpec(name=name, kind="random", simulations=0)
    simulations = int(match["simulations"])
    if not 1 <= simulations <= MAX_SIMULATIONS:
        raise ExampleError(f"player {name!r} must search between 1 and {MAX_SIMULATIONS} simulations a move")
    return PlayerSpec(name=name, kind=match["kind"], simulations=simulations)


class RandomPlayer:
    """Any legal move, all equally likely: the zero of the scale."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, state: Any, moves: Sequence[str]) -> int:
        action: int = self._random.choice(state.legal_actions())
        return action


class MCTSPlayer:
    """Plain Monte-Carlo tree search; plays the most visited move."""

    def __init__(self, game: Any, *, simulations: int, seed: int) -> None:
        pyspiel = load_pyspiel()
        playouts = pyspiel.RandomRolloutEvaluator(n_rollouts=1, seed=derive_seed(seed, "playouts"))
        self._bot = pyspiel.MCTSBot(
            game,
            playouts,
            uct_c=math.sqrt(2),
            max_simulations=simulations,
            max_memory_mb=TREE_MEMORY_MB,
            solve=True,
            seed=derive_seed(seed, "tree"),
            verbose=False,
        )

    def choose(self, state: Any, moves: Sequence[str]) -> int:
        action: int = self._bot.step(state)
        return action


class BookPlayer:
    """Plays the book's move where the book has one, and asks the search everywhere else."""

    def __init__(self, book: Book, search: MCTSPlayer) -> None:
        self._book = book
        self._search = search
        self.book_moves = 0

    def choose(self, state: Any, moves: Sequence[str]) -> int:
        # A book is a file, so it may be for other rules: a move that is not legal here is no move.
        action = legal_moves(state).get(self._book.choose(moves) or "")
        if action is None:
            return self._search.choose(state, moves)
        self.book_moves += 1
        return action
