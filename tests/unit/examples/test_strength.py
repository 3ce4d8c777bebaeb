"""Strength: known figures of the statistics, known strengths from made-up results, and real matches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from examples.selfplay.book import Book
from examples.selfplay.elo import elo_difference, expected_score, rate, wilson_interval
from examples.selfplay.errors import ExampleError
from examples.selfplay.games import GameRecord
from examples.selfplay.players import derive_seed, parse_player

Step = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("points", "games", "low", "high"),
    [
        # The first four are Table I of Newcombe, "Two-sided confidence intervals for the single proportion" (1998).
        pytest.param(81, 263, 0.2553, 0.3662, id="newcombe-81-of-263"),
        pytest.param(15, 148, 0.0624, 0.1605, id="newcombe-15-of-148"),
        pytest.param(0, 20, 0.0, 0.1611, id="newcombe-0-of-20"),
        pytest.param(1, 29, 0.0061, 0.1718, id="newcombe-1-of-29"),
        pytest.param(5, 10, 0.2366, 0.7634, id="half-of-ten"),
        pytest.param(0, 0, 0.0, 1.0, id="nothing-known"),
    ],
)
def test_wilson_interval_gives_the_published_figures(points: float, games: int, low: float, high: float) -> None:
    assert wilson_interval(points, games) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_elo_scale_is_ten_to_one_at_400_points() -> None:
    assert expected_score(400) == pytest.approx(10 / 11)
    assert expected_score(0) == 0.5


def test_elo_difference_of_a_clean_sweep_is_finite_and_of_an_even_match_is_zero() -> None:
    estimate, low, high = elo_difference(20, 20)
    assert 0 < low < estimate < high < math.inf
    assert elo_difference(10, 20)[0] == pytest.approx(0)


def test_ratings_recover_known_strengths() -> None:
    """Expected scores instead of drawn ones: then the maximum of the likelihood is the truth itself."""
    truth = {"a": 1720.0, "b": 1540.0, "c": 1490.0, "d": 1250.0}
    points = {}
    for a, b in combinations(truth, 2):
        score = expected_score(truth[a] - truth[b])
        points[a, b], points[b, a] = 200 * score, 200 * (1 - score)
    ratings = rate(list(truth), points, prior_games=0)
    assert {name: rating.elo for name, rating in ratings.items()} == pytest.approx(truth, abs=0.01)


def test_error_of_two_equal_players_is_the_textbook_one() -> None:
    """n games at 50 %: the difference has a standard error of (400 / ln 10) · 2 / √n; each rating has half of it."""
    ratings = rate(["a", "b"], {("a", "b"): 50.0, ("b", "a"): 50.0}, prior_games=0)
    assert ratings["a"].error == pytest.approx(1.96 * 400 / math.log(10) * 2 / math.sqrt(100) / 2, rel=1e-4)


def test_a_player_who_lost_everything_still_has_a_rating() -> None:
    ratings = rate(["a", "b", "c"], {("a", "b"): 4.0, ("b", "a"): 0.0, ("a", "c"): 4.0, ("b", "c"): 4.0})
    assert ratings["a"].elo > ratings["b"].elo > ratings["c"].elo > 0
    assert sum(rating.elo for rating in ratings.values()) / 3 == pytest.approx(1500)


def test_tournament_rates_longer_search_above_shorter_and_both_above_chance(step: Step) -> None:
    result = step(
        "tournament", "--game", "connect_four", "--players", "random,mcts10,mcts100", "--rounds", "6", "--seed", "1"
    )
    assert [row["player"] for row in result["table"]] == ["mcts100", "mcts10", "random"]
    assert result["games"] == 36
    for row in result["table"]:
        assert row["games"] == row["wins"] + row["draws"] + row["losses"] == 24
        assert row["error"] > 0
    assert sum(row["elo"] for row in result["table"]) / 3 == pytest.approx(1500, abs=0.1)


def test_tournament_with_one_more_player_repeats_the_games_of_the_others(step: Step) -> None:
    def pairing(players: str) -> dict[str, Any]:
        result = step("tournament", "--game=hex5", f"--players={players}", "--rounds=4")
        return next(row for row in result["pairings"] if {row["player"], row["opponent"]} == {"mcts5", "mcts9"})

    assert pairing("mcts5,mcts9") == pairing("mcts5,random,mcts9")


def test_evaluation_prefers_the_longer_search_and_alternates_sides(
    step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    result = step(
        "evaluate", "--game=connect_four", "--games=20", "--simulations=150", "--baseline-simulations=3", "--seed=1"
    )
    log = capsys.readouterr().out
    assert result["wins"] + result["draws"] + result["losses"] == 20
    assert result["score"] > 0.7 and result["elo_difference"] > 100
    low, high = result["score_interval"]
    assert 0 < low < result["score"] <= high <= 1
    assert log.count("moving first") == log.count("moving second") == 10
    assert result["book"] == {"files": 0, "games": 0, "positions": 0} and result["book_moves"] == 0


def test_evaluation_is_determined_by_its_seed(step: Step) -> None:
    def run(seed: int) -> dict[str, Any]:
        result = step("evaluate", "--game=hex5", "--games=10", "--simulations=9", f"--seed={seed}")
        return {name: value for name, value in result.items() if name != "seconds"}

    assert run(4) == run(4)
    assert run(4) != {**run(5), "seed": 4}


def test_evaluation_opens_from_the_games_of_the_store_and_leaves_its_model(step: Step, job: Path) -> None:
    step("play", "--game=hex5", "--games=10", "--simulations=30", "--opening-plies=0", "--seed=1")
    result = step("evaluate", "--game=hex5", "--games=4", "--simulations=5", "--seed=1")
    assert result["book"]["games"] == 10 and result["book"]["files"] == 1
    assert result["book_moves"] >= 2  # it moves first twice, and the first position is in every book
    again = step(
        "evaluate", "--game=hex5", "--games=4", "--simulations=5", "--seed=1", f"--newest={job / 'model.json'}"
    )
    assert (again["wins"], again["moves"], again["book"]) == (result["wins"], result["moves"], result["book"])


def game_of(moves: str, first: float, random_plies: int = 0) -> GameRecord:
    return GameRecord(
        game="hex5",
        game_string="hex(board_size=5)",
        moves=tuple(moves.split()),
        returns=(first, -first),
        random_plies=random_plies,
        simulations=10,
        seed=0,
        seconds=0.0,
    )


def test_book_repeats_the_searched_move_that_won_most() -> None:
    book = Book.from_games(
        "hex5",
        [
            game_of("a1 b2", first=1),
            game_of("a1 c3", first=-1),
            game_of("c3 b2", first=1),
            game_of("c3 b2", first=1),
            *[game_of("e5 e4", first=1, random_plies=1)] * 9,  # drawn by lot: says nothing about e5
        ],
    )
    assert book.choose([]) == "c3"
    assert book.choose(["a1"]) == "c3"  # the answer that beat a1
    assert book.choose(["c3"]) is None  # nothing has won against c3
    assert book.choose(["e5", "e4"]) is None  # never seen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("{", "not a model.json", id="not-json"),
        pytest.param("[]", "not a model.json", id="not-an-object"),
        pytest.param('{"format": 99}', "not a model.json", id="other-format"),
        pytest.param('{"format": 1, "positions": {"": {"a1": 3}}}', "not a model.json", id="bad-count"),
        pytest.param(None, "cannot read", id="missing"),
    ],
)
def test_a_model_that_is_not_one_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExampleError, match=rf"--newest: .*{words}|--newest: {words}"):
        Book.load(path, game="hex5")


def test_a_model_of_another_game_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(Book(game="connect_four").to_json()))
    with pytest.raises(ExampleError, match="a book of connect_four, not of hex5"):
        Book.load(path, game="hex5")


def test_a_book_with_moves_of_other_rules_is_played_around(step: Step, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    model = {"format": 1, "game": "hex5", "files": 1, "games": 1, "positions": {"": {"z9": [1, 1.0]}}}
    path.write_text(json.dumps(model))
    result = step("evaluate", "--game=hex5", "--games=2", "--simulations=5", f"--newest={path}")
    assert result["book_moves"] == 0


def test_players_are_named_by_kind_and_budget() -> None:
    assert (parse_player("mcts25").kind, parse_player("mcts25").simulations) == ("mcts", 25)
    assert (parse_player("book100").kind, parse_player("book100").simulations) == ("book", 100)
    assert parse_player("random").simulations == 0


def test_derived_seeds_fit_a_c_int_and_do_not_change_between_versions() -> None:
    assert derive_seed(1, "hex5", 0) == 1_804_969_487
    assert all(0 <= derive_seed(seed) < 2**31 for seed in range(100))
