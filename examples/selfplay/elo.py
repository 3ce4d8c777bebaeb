"""Strength from results: intervals of a score, Elo differences, and ratings of a tournament.

Scores count a draw as half a point. Elo's scale: 400 points are odds of 10 to 1. Pure arithmetic, no games.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959964
"""Standard errors of a two-sided 95 % interval."""
PRIOR_GAMES = 1.0
"""Imaginary drawn games per pairing. A clean sweep has no finite maximum of the likelihood; one draw gives it one."""
MAX_ITERATIONS = 20_000
TOLERANCE = 1e-10


def wilson_interval(points: float, games: float, *, z: float = Z95) -> tuple[float, float]:
    """The interval of the true score, given `points` out of `games`; (0, 1) without games.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Unlike
    score ± 2 standard errors it stays within 0 and 1 and holds for ten games or a clean sweep. With draws it is a
    little too wide, since half points vary less than whole ones.
    """
    if games <= 0:
        return 0.0, 1.0
    score = points / games
    centre = score + z * z / (2 * games)
    spread = z * math.sqrt(score * (1 - score) / games + z * z / (4 * games * games))
    scale = 1 + z * z / games
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def elo_from_score(score: float) -> float:
    """The rating difference at which `score` (strictly between 0 and 1) is expected."""
    return 400 * math.log10(score / (1 - score))


def expected_score(difference: float) -> float:
    """The score expected of a player rated `difference` points higher."""
    return 1 / (1 + 10 ** (-difference / 400))


def elo_difference(points: float, games: int) -> tuple[float, float, float]:
    """(estimate, low, high) of the rating difference behind a match, 95 % interval, in Elo points.

    `PRIOR_GAMES` imaginary draws keep all three finite when one side won everything.
    """
    points, total = points + PRIOR_GAMES / 2, games + PRIOR_GAMES
    low, high = wilson_interval(points, total)
    return elo_from_score(points / total), elo_from_score(low), elo_from_score(high)


@dataclass(frozen=True, slots=True)
class Rating:
    """`elo` points, and the half width `error` of its 95 % interval against the field's mean."""

    elo: float
    error: float


def rate(
    players: Sequence[str],
    points: Mapping[tuple[str, str], float],
    *,
    mean: float = 1500.0,
    prior_games: float = PRIOR_GAMES,
) -> dict[str, Rating]:
    """Maximum-likelihood Elo of a round robin; `points[a, b]` is what a took from b. Mean rating `mean`.

    The Bradley-Terry model fitted by the minorisation-maximisation algorithm of D. R. Hunter, "MM algorithms for
    generalized Bradley-Terry models", Annals of Statistics 32 (2004), section 2. The first mover's advantage is not
    modelled, so both colours must have been played equally often. Every two players must have met, or `prior_games`
    be positive.
    """
    size = len(players)
    taken = [[0.0 if a == b else points.get((a, b), 0.0) + prior_games / 2 for b in players] for a in players]
    games = [[taken[i][j] + taken[j][i] for j in range(size)] for i in range(size)]
    strength = _fit(taken, games)
    logs = [400 * math.log10(value) for value in strength]
    centre = sum(logs) / size
    errors = _errors(strength, games)
    return {name: Rating(mean + logs[i] - centre, errors[i]) for i, name in enumerate(players)}


def _fit(taken: list[list[float]], games: list[list[float]]) -> list[float]:
    size = len(taken)
    strength = [1.0] * size
    for _ in range(MAX_ITERATIONS):
        fitted = [
            sum(taken[i]) / sum(games[i][j] / (strength[i] + strength[j]) for j in range(size) if j != i)
            for i in range(size)
        ]
        # Only ratios mean anything, so the geometric mean is pinned to 1; otherwise all of them drift together.
        scale = math.exp(sum(math.log(value) for value in fitted) / size)
        fitted = [value / scale for value in fitted]
        change = max(abs(math.log(new / old)) for new, old in zip(fitted, strength, strict=True))
        strength = fitted
        if change < TOLERANCE:
            break
    return strength


def _errors(strength: list[float], games: list[list[float]]) -> list[float]:
    """95 % half widths from the Fisher information.

    The information of log strengths is a graph Laplacian L of the weights n·p·(1-p). It has no inverse, since adding a
    constant to every rating changes nothing; with the mean pinned the covariance is (L + J/n)⁻¹ - J/n, J all ones.
    """
    size = len(strength)
    matrix = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(size):
            if i != j:
                weight = games[i][j] * strength[i] * strength[j] / (strength[i] + strength[j]) ** 2
                matrix[i][j] -= weight
                matrix[i][i] += weight
    shifted = [[value + 1 / size for value in row] for row in matrix]
    covariance = _inverse(shifted)
    return [Z95 * 400 / math.log(10) * math.sqrt(max(0.0, covariance[i][i] - 1 / size)) for i in range(size)]


def _inverse(matrix: list[list[float]]) -> list[list[float]]:
    """Gauss-Jordan with row exchanges; fields are a handful of players, so a numerical library would be a burden."""
    size = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and rows[i][column]:
                factor = rows[i][column]
                rows[i] = [value - factor * top for value, top in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]
