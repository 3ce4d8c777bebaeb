"""The games, and one game played from the first move to the result.

OpenSpiel (Lanctot et al., "OpenSpiel: A Framework for Reinforcement Learning in Games", arXiv:1908.09453) has the
rules. It is imported when the first game is loaded, so that `--help` and errors about flags need nothing installed.
Its objects are untyped, hence `Any`. Who chooses the moves is in `players`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .errors import ExampleError
from .stop import StopRequest

GAMES: dict[str, str] = {
    "connect_four": "connect_four",
    "hex5": "hex(board_size=5)",
}
"""Our name of a game -> OpenSpiel's. Any two-player game of alternate moves without chance may be added here."""


class Player(Protocol):
    """Chooses a legal action in `state`, which was reached by `moves`. Made for one game, so it may keep state."""

    def choose(self, state: Any, moves: Sequence[str]) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GameRecord:
    """One finished game, and one line of a games file.

    `moves` are OpenSpiel's action strings, `returns` the result for the first and the second player (1, 0 or -1),
    `random_plies` how many of the first moves were drawn by lot, `simulations` the search budget of a move and
    `seconds` the time it took, the one field that differs between two runs with the same seed.
    """

    game: str
    game_string: str
    moves: tuple[str, ...]
    returns: tuple[float, float]
    random_plies: int
    simulations: int
    seed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> GameRecord:
        """Raises `KeyError`, `TypeError` or `ValueError` if `fields` is not a game record."""
        first, second = fields["returns"]
        return cls(
            game=str(fields["game"]),
            game_string=str(fields["game_string"]),
            moves=tuple(str(move) for move in fields["moves"]),
            returns=(float(first), float(second)),
            random_plies=int(fields["random_plies"]),
            simulations=int(fields["simulations"]),
            seed=int(fields["seed"]),
            seconds=float(fields["seconds"]),
        )


def load_pyspiel() -> Any:
    """OpenSpiel's module. Raises `ExampleError` saying how to install it."""
    try:
        import pyspiel
    except ModuleNotFoundError:
        raise ExampleError("OpenSpiel is not installed: pip install 'p2p-orchestrator[examples]'") from None
    except ImportError as error:
        raise ExampleError(f"OpenSpiel is installed but does not load on this machine: {error}") from error
    return pyspiel


def load_game(name: str) -> Any:
    """The OpenSpiel game that we call `name`, one of `GAMES`. Raises `ExampleError`."""
    if name not in GAMES:
        raise ExampleError(f"--game: there is no game {name!r}; choose from {', '.join(GAMES)}")
    return load_pyspiel().load_game(GAMES[name])


def legal_moves(state: Any) -> dict[str, int]:
    """The legal moves as {action string: action}."""
    return {state.action_to_string(action): action for action in state.legal_actions()}


def play_game(
    game: Any,
    seats: tuple[Player, Player],
    *,
    name: str,
    simulations: int,
    seed: int,
    stop: StopRequest,
    random_plies: int = 0,
) -> GameRecord:
    """Plays `seats[0]` (moves first) against `seats[1]`.

    The first `random_plies` moves are drawn uniformly with `seed`, so that deterministic players still give different
    games. Raises `Stopped` when a stop signal has waited too long for the game to end.
    """
    started = time.perf_counter()
    lots = random.Random(seed)
    state = game.new_initial_state()
    moves: list[str] = []
    while not state.is_terminal():
        stop.check_patience()
        if len(moves) < random_plies:
            action = lots.choice(state.legal_actions())
        else:
            action = seats[state.current_player()].choose(state, moves)
        moves.append(state.action_to_string(action))
        state.apply_action(action)
    first, second = state.returns()
    return GameRecord(
        game=name,
        game_string=str(game),
        moves=tuple(moves),
        returns=(first, second),
        random_plies=min(random_plies, len(moves)),
        simulations=simulations,
        seed=seed,
        seconds=round(time.perf_counter() - started, 4),
    )


def replay(record: GameRecord) -> tuple[float, float]:
    """The result that the rules give for the moves of `record`. Raises `ExampleError` at an illegal or missing move."""
    state = load_pyspiel().load_game(record.game_string).new_initial_state()
    for ply, move in enumerate(record.moves, start=1):
        legal = {} if state.is_terminal() else legal_moves(state)
        if move not in legal:
            raise ExampleError(f"move {ply} ({move}) of a game of {record.game} is not legal")
        state.apply_action(legal[move])
    if not state.is_terminal():
        raise ExampleError(f"a game of {record.game} has no result after {len(record.moves)} moves")
    first, second = state.returns()
    return first, second
