"""Kinds of jobs: templates, defaults, what a bad jobs.yaml is told, and the ones that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.settings import ROOT
from coordination.errors import InvalidInput
from coordination.job import JobSpec
from coordination.kinds import Kind, Kinds
from coordination.submission import Submission

PLAY = Kind.model_validate(
    {
        "aliases": ["games"], "command": ["play", "--game", "{game}", "--n={n}", "{{x}}"],
        "params": {"n": 10, "unused": 1}, "timeout_seconds": 60.0,
    }
)  # fmt: skip


def kinds(environment: dict[str, str] | None = None) -> Kinds:
    return Kinds({"play": PLAY, "bare": Kind()}, environment or {})


def filled(**spec: Any) -> list[str]:
    job = JobSpec.model_validate(spec)
    return kinds().command(job, kinds().canonical(job.kind))


def test_template_is_filled_from_the_job_then_from_the_kind() -> None:
    assert filled(kind="play", params={"game": "hex", "n": 3, "x": True}) == [
        "play",
        "--game",
        "hex",
        "--n=3",
        "{true}",
    ]
    assert filled(kind="play", params={"game": "hex", "x": 1.5})[3] == "--n=10"


def test_value_is_not_filled_again() -> None:
    assert filled(kind="play", params={"game": "{n}", "x": 1})[2] == "{n}"


def test_own_command_keeps_braces_it_gives_no_param_for() -> None:
    assert filled(command=["echo", '{"a": {b}}', "{c}"], params={"c": 1}) == ["echo", '{"a": {b}}', "1"]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"kind": "play", "params": {"x": 1}}, "params.game", "needs it"),
        ({"kind": "play", "params": {"gmae": "hex"}}, "params.gmae", "did you mean 'game'"),
        ({"kind": "play", "params": {"zzz": 1}}, "params.zzz", "it takes game, n, unused, x"),
        ({"kind": "plya", "command": ["a"]}, "kind", "did you mean 'play'"),
        ({"kind": "qqq", "command": ["a"]}, "kind", "known kinds: bare, command, play"),
        ({"kind": "bare"}, "command", "'bare' has no command of its own"),
    ],
)
def test_refusal_names_the_param_and_the_nearest(spec: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        filled(**spec)
    assert refused.value.field == field
    assert words in refused.value.detail


def test_alias_is_the_kind() -> None:
    assert kinds().canonical("games") == "play"


def test_command_is_always_a_kind() -> None:
    assert Kinds({}, {}).canonical("command") == "command"
    assert Kinds.load(None, {}).canonical("command") == "command"


@pytest.mark.parametrize("alias", ["bare", "command"])
def test_alias_that_is_another_kinds_name_is_refused(alias: str) -> None:
    clash = PLAY.model_copy(update={"aliases": [alias]})
    with pytest.raises(InvalidInput, match="already the name of a kind") as refused:
        Kinds({"play": clash, "bare": Kind()}, {})
    assert refused.value.field == "kinds.play.aliases"


# -- RINGRIFT_<KIND>_TIMEOUT -----------------------------------------------------------------------------------------


def test_environment_overrides_a_kinds_timeout() -> None:
    assert kinds().timeout_seconds("play") == 60
    assert kinds({"RINGRIFT_PLAY_TIMEOUT": "7.5"}).timeout_seconds("play") == 7.5
    assert kinds({"RINGRIFT_BARE_TIMEOUT": "5"}).timeout_seconds("bare") == 5
    dashed = Kinds({"self-play": Kind()}, {"RINGRIFT_SELF_PLAY_TIMEOUT": "9"})
    assert dashed.timeout_seconds("self-play") == 9


def test_override_may_name_an_alias_and_the_kinds_own_name_goes_first() -> None:
    assert kinds({"RINGRIFT_GAMES_TIMEOUT": "8"}).timeout_seconds("play") == 8
    both = {"RINGRIFT_GAMES_TIMEOUT": "8", "RINGRIFT_PLAY_TIMEOUT": "7"}
    assert kinds(both).timeout_seconds("play") == 7
    with pytest.raises(InvalidInput) as refused:
        kinds({"RINGRIFT_GAMES_TIMEOUT": "soon"})
    assert refused.value.field == "RINGRIFT_GAMES_TIMEOUT"


@pytest.mark.parametrize(
    ("kind", "variable", "default"),
    [
        ("selfplay", "RINGRIFT_SELFPLAY_TIMEOUT", 7_200),
        ("training", "RINGRIFT_TRAINING_TIMEOUT", 86_400),
        ("evaluation", "RINGRIFT_EVALUATION_TIMEOUT", 3_600),
        ("gauntlet", "RINGRIFT_GAUNTLET_TIMEOUT", 3_600),
        ("gauntlet", "RINGRIFT_EVALUATION_TIMEOUT", 3_600),
        ("tournament", "RINGRIFT_TOURNAMENT_TIMEOUT", 3_600),
    ],
)
def test_timeouts_of_the_kinds_that_ship_can_be_overridden(kind: str, variable: str, default: int) -> None:
    def timeout_ms(environment: dict[str, str], **job: Any) -> int:
        submission = Submission(Kinds.load(ROOT / "config/jobs.yaml", environment), 0, batch=False)
        submission.add({"kind": kind, "command": ["true"], **job})
        return submission.finish()[0].timeout_ms

    assert timeout_ms({}) == default * 1_000
    assert timeout_ms({variable: "77"}) == 77_000
    assert timeout_ms({variable: "77"}, timeout_seconds=5) == 5_000, "what the job itself says wins"


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "inf", "nan", "1e16"])
def test_override_that_is_no_timeout_is_told_at_start(text: str) -> None:
    """1e16 s is more milliseconds than a database integer holds: applied, it would have stopped every voter."""
    with pytest.raises(InvalidInput, match="positive number of seconds") as refused:
        kinds({"RINGRIFT_PLAY_TIMEOUT": text})
    assert refused.value.field == "RINGRIFT_PLAY_TIMEOUT"


# -- jobs.yaml -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("kinds: {a: {comand: [x]}}", "kinds.a.comand", "did you mean 'command'"),
        ("kinds: {a: {priority: 500}}", "kinds.a.priority", "100"),
        ("kinds: {a: {requires: {gpu: 1}}}", "kinds.a.requires.gpu", "did you mean 'gpus'"),
        ("kinds: {a: {timeout_seconds: 0}}", "kinds.a.timeout_seconds", "greater than 0"),
        ("kinds: {a: {timeout_seconds: 1.0e+16}}", "kinds.a.timeout_seconds", "less than or equal"),
        ("kinds: {a: {command: play}}", "kinds.a.command", "list"),
        ("kinds: {a: {populate: {}}}", "kinds.a.populate.pending", "is required"),
        ("kinds: {a: {populate: {pending: 1, vary: {game: []}}}}", "kinds.a.populate.vary.game", "at least 1"),
        ("kind: {}", "kind", "did you mean 'kinds'"),
        ("{}", "kinds", "is required"),
        ("[]", "(body)", ""),
        ("", "(body)", ""),
    ],
)
def test_bad_catalogue_is_told_by_file_and_field(tmp_path: Path, text: str, field: str, words: str) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        Kinds.load(path, {})
    assert refused.value.field == f"{path}: {field}"
    assert words in refused.value.detail


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        Kinds.load(tmp_path / "none.yaml", {})
    broken = tmp_path / "jobs.yaml"
    broken.write_text("kinds: [")
    with pytest.raises(InvalidInput, match="is not YAML"):
        Kinds.load(broken, {})


@pytest.mark.parametrize(
    ("name", "priority", "timeout"),
    [
        ("training", 100, 86_400),
        ("evaluation", 85, 3_600),
        ("tournament", 80, 3_600),
        ("selfplay", 75, 7_200),
        ("command", 50, None),
    ],
)
def test_shipped_kinds_are_those_of_the_design(name: str, priority: int, timeout: float | None) -> None:
    shipped = Kinds.load(ROOT / "config/jobs.yaml", {})
    assert shipped.by_name[name].priority == priority
    assert shipped.timeout_seconds(name) == timeout


def test_shipped_catalogue_as_a_whole() -> None:
    shipped = Kinds.load(ROOT / "config/jobs.yaml", {})
    assert set(shipped.by_name) == {"training", "evaluation", "tournament", "selfplay", "command"}
    assert shipped.canonical("gauntlet") == "evaluation"
    others = max(shipped.by_name[name].requires.memory_mb for name in ("evaluation", "tournament", "selfplay"))
    assert shipped.by_name["training"].requires.memory_mb > others, "training goes to high-memory nodes"


def test_whatever_the_shipped_populator_adds_is_accepted() -> None:
    from coordination.population import wanted
    from coordination.submission import Submission

    shipped = Kinds.load(ROOT / "config/jobs.yaml", {})
    plan = wanted(shipped, {}, force=True)
    assert {want.kind for want in plan} >= {"evaluation", "tournament", "selfplay"}
    for want in plan:
        submission = Submission(shipped, 0, batch=True)
        for body in want.jobs:
            submission.add(body)
        assert len(submission.finish()) == shipped.by_name[want.kind].populate.pending  # type: ignore[union-attr]
