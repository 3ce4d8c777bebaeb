"""Settings: where each comes from, which wins, and what a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.settings import QueueSettings, Settings, SettingsError, build, is_loopback, load, read_token

SECRET = "s3cret-s3cret-s3cret"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without a config/cluster.yaml of its own."""
    monkeypatch.chdir(tmp_path)


def token_file(folder: Path, text: str = SECRET, *, name: str = "token", mode: int = 0o600) -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def config(folder: Path, **values: Any) -> str:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_no_flags_is_one_node_on_loopback() -> None:
    settings = load(["--node-id", "n1"], {})
    assert (settings.host, settings.port, settings.worker, settings.auth_token) == ("127.0.0.1", 8770, True, None)
    assert (settings.data_dir, settings.log_dir, settings.journal) == (Path("data/n1"), Path("logs"), "raft:")
    assert (settings.queue.lease_seconds, settings.queue.heartbeat_seconds) == (30, 5)
    assert settings.jobs_file is not None and settings.jobs_file.name == "jobs.yaml"


def test_hostname_that_is_no_id_is_made_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box_1.example.com/" + "x" * 99)
    assert load([], {}).node_id == ("box_1.example.com-" + "x" * 99)[:63]


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = config(tmp_path, node_id="from-file", port=1111, log_dir="from-file")
    assert load(["--config", file], {}).node_id == "from-file"
    assert load(["--config", file], {"P2P_NODE_ID": "from-env"}).node_id == "from-env"
    settings = load(["--config", file, "--node-id", "from-flag", "--port", "2222"], {"P2P_NODE_ID": "from-env"})
    assert (settings.node_id, settings.port, settings.log_dir) == ("from-flag", 2222, Path("from-file"))


def test_cluster_yaml_of_the_working_folder_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config/cluster.yaml").write_text("port: 1234\n")
    assert load([], {}).port == 1234


def test_switches_are_told_apart_from_silence(tmp_path: Path) -> None:
    file = config(tmp_path, worker=False, populator={"interval_seconds": 3})
    assert load(["--config", file], {}).worker is False
    assert load(["--no-worker"], {}).worker is False
    populator = load(["--config", file, "--no-populate"], {}).populator
    assert (populator.enabled, populator.interval_seconds) == (False, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prot": 1}, "prot: there is no such setting; did you mean 'port'?"),
        ({"queue": {"lease_second": 1}}, "queue.lease_second: there is no such setting; did you mean 'lease_seconds'?"),
        ({"zzzzzz": 1}, "zzzzzz: there is no such setting"),
        ({"port": 70_000}, "port: "),
        ({"queue": {"lease_seconds": 0}}, "queue.lease_seconds: "),
        ({"queue": None}, "queue: "),
        ({"node_id": "a b"}, "node_id: use letters"),
        ({"node_id": "n1\n"}, "node_id: use letters"),
        ({"node_id": "x" * 64}, "node_id: use letters"),
        ({"journal": "etcd:"}, "journal: this version has the journal 'raft:' only"),
        ({"auth_token": SECRET}, "auth_token does not belong in this file; use auth_token_file"),
    ],
)
def test_wrong_setting_in_the_file_is_named(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(["--config", config(tmp_path, **{"node_id": "n1", **values})], {})
    assert words in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port: [", "cluster.yaml"),
        (b"- a\n", "must be a mapping"),
        (b"\xff\xfe\x00", "cluster.yaml"),
        (b"populator: null\n", "populator"),
    ],
)
def test_file_that_is_no_settings_is_an_error_and_not_a_traceback(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "cluster.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        load(["--config", str(tmp_path / "cluster.yaml"), "--no-populate"], {})


def test_config_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--config: there is no file"):
        load(["--config", str(tmp_path / "none.yaml")], {})
    with pytest.raises(SettingsError, match="directory"):
        load(["--config", str(tmp_path)], {})


def test_empty_file_is_no_settings(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("# nothing yet\n")
    assert load(["--config", str(tmp_path / "cluster.yaml")], {}).port == 8770


# -- the token -------------------------------------------------------------------------------------------------------


def test_token_opens_the_node_to_others(tmp_path: Path) -> None:
    settings = load(["--auth-token-file", token_file(tmp_path, f" {SECRET}\n")], {})
    assert settings.host == "0.0.0.0"
    assert settings.auth_token is not None
    assert settings.auth_token.get_secret_value() == SECRET


def test_token_comes_from_the_flag_then_the_environment_then_the_file(tmp_path: Path) -> None:
    names = ("flag", "env-file", "in-file")
    flag, env_file, in_file = (token_file(tmp_path, f"{name}-{SECRET}", name=name) for name in names)
    file = config(tmp_path, auth_token_file=in_file)
    both = {"RINGRIFT_CLUSTER_AUTH_TOKEN_FILE": env_file, "RINGRIFT_CLUSTER_AUTH_TOKEN": f"env-{SECRET}"}
    direct = {"RINGRIFT_CLUSTER_AUTH_TOKEN": f"env-{SECRET}"}

    def token(arguments: list[str], env: dict[str, str]) -> str:
        secret = load([*arguments, "--config", file], env).auth_token
        assert secret is not None
        return secret.get_secret_value().removesuffix(f"-{SECRET}")

    assert token(["--auth-token-file", flag], both) == "flag"
    assert token([], both) == "env-file"
    assert token([], direct) == "env"
    assert token([], {}) == "in-file"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_token_that_others_can_touch_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match=r"can be read by others; run: chmod 600") as error:
        read_token({}, token_file(tmp_path, mode=mode))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_token_of_its_owner_alone_is_taken(tmp_path: Path, mode: int) -> None:
    assert read_token({}, token_file(tmp_path, mode=mode)) == SECRET


def test_token_file_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_token({"RINGRIFT_CLUSTER_AUTH_TOKEN_FILE": str(tmp_path / "none")}, None)
    with pytest.raises(SettingsError, match="is empty"):
        read_token({}, token_file(tmp_path, " \n"))


def test_no_token_is_none() -> None:
    assert read_token({}, None) is None
    assert read_token({"RINGRIFT_CLUSTER_AUTH_TOKEN": ""}, None) is None


def test_short_token_is_refused_without_being_shown() -> None:
    with pytest.raises(SettingsError, match="at least 16 characters") as error:
        load([], {"RINGRIFT_CLUSTER_AUTH_TOKEN": "tooshort-secret"})
    assert "tooshort" not in str(error.value)


@pytest.mark.parametrize(
    "show", [repr, str, lambda s: s.model_dump_json(), lambda s: json.dumps(s.model_dump(), default=str)]
)
def test_secret_is_in_no_text_made_of_the_settings(show: Any) -> None:
    settings = load([], {"RINGRIFT_CLUSTER_AUTH_TOKEN": SECRET})
    assert settings.auth_token is not None
    assert SECRET not in show(settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "box.example.com", "127.evil.example.com", ""])
def test_node_without_a_token_refuses_to_listen_beyond_loopback(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(SettingsError, match="without a token a node listens on loopback only"):
        load(["--host", host], {})
    assert load(["--host", host], {"RINGRIFT_CLUSTER_AUTH_TOKEN": SECRET}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    assert load(["--host", host], {}).host == host


def test_settings_cannot_be_changed() -> None:
    settings = build({"node_id": "n1", "host": "127.0.0.1", "data_dir": "d"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1
    with pytest.raises(ValueError, match="frozen"):
        settings.queue.lease_seconds = 1
    assert isinstance(settings, Settings)


@pytest.mark.parametrize("flag", ["--tls-cert", "--tls-cert=x", "--tls-key", "--tls-ca"])
def test_a_flag_of_a_later_version_is_refused_by_name(flag: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag.partition('=')[0]}: this version has no TLS of its own"):
        load([flag, "x"], {})


# -- the cluster -----------------------------------------------------------------------------------------------------


def test_the_flags_of_a_cluster_are_settings() -> None:
    flags = ["--peers", " a:1, [::1]:2 ,", "--priority", "-5", "--voter", "--advertise", "gpu-07.example.org:8770"]
    settings = load(flags, {})
    assert (settings.peers, settings.priority, settings.voter) == (("a:1", "[::1]:2"), -5, True)
    assert (settings.advertise, settings.adopt) == ("gpu-07.example.org:8770", False)
    assert load(["--adopt"], {}).adopt is True


@pytest.mark.parametrize(("flags", "voter"), [([], None), (["--voter"], True), (["--no-voter"], False)])
def test_whether_to_vote_is_asked_refused_or_left_to_the_autopilot(flags: list[str], voter: bool | None) -> None:
    assert load(flags, {}).voter is voter


def test_peers_of_the_file_may_be_a_list_or_a_text(tmp_path: Path) -> None:
    for told in (["a:1", "b:2"], "a:1,b:2"):
        assert load(["--config", config(tmp_path, peers=told)], {}).peers == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "a"], "peers: must be HOST:PORT"),
        (["--peers", "a:1,b"], "peers: must be HOST:PORT"),
        (["--peers", "a:0"], "peers: must be HOST:PORT"),
        (["--peers", "a:65536"], "peers: must be HOST:PORT"),
        (["--peers", "http://a:1"], "peers: must be HOST:PORT"),
        (["--peers", "user@a:1"], "peers: must be HOST:PORT"),
        (["--peers", ",".join(f"h{n}:1" for n in range(65))], "peers: names at most 64 members"),
        (["--peers", ""], "peers: is empty"),
        (["--peers", " , "], "peers: is empty"),
        (["--advertise", "none"], "a node that nobody can dial needs --peers"),
        (["--priority", "1001"], "priority: "),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        load(flags, {})
    assert words in str(error.value)


@pytest.mark.parametrize("target", [2, 4, 6])
def test_an_even_number_of_voters_is_refused_with_the_reason(target: int) -> None:
    with pytest.raises(SettingsError, match=f"must be odd: {target} voters survive no more failures than {target - 1}"):
        build({"node_id": "n", "host": "127.0.0.1", "data_dir": "d", "cluster": {"voter_target": target}})


def test_a_shorter_lease_brings_more_frequent_heartbeats() -> None:
    assert QueueSettings(lease_seconds=3).heartbeat_seconds == 0.5
    assert QueueSettings(lease_seconds=60).heartbeat_seconds == 5


def test_heartbeats_rarer_than_leases_are_refused() -> None:
    with pytest.raises(SettingsError, match="heartbeat_seconds"):
        build({"node_id": "n", "host": "127.0.0.1", "data_dir": "d", "queue": {"heartbeat_seconds": 60}})


def test_the_example_file_names_every_setting_with_its_default() -> None:
    text = (Path(__file__).resolve().parents[3] / "config/cluster.example.yaml").read_text()
    required = {"node_id": "n", "host": "127.0.0.1", "data_dir": "d"}
    assert build({**required, **yaml.safe_load(text)}) == build(dict(required))
    for name, field in Settings.model_fields.items():
        assert f"{name}:" in text or name == "auth_token", name
        section = field.annotation
        for inner in getattr(section, "model_fields", {}):
            assert f"  {inner}:" in text, f"{name}.{inner}"


@pytest.mark.parametrize("advertise", ["foo", "foo:", ":8770", "foo:bar", "a b:1"])
def test_an_address_to_advertise_is_a_host_and_a_port(advertise: str) -> None:
    with pytest.raises(SettingsError, match="advertise: must be HOST:PORT"):
        load(["--advertise", advertise], {})
