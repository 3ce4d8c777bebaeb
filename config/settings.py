"""Every setting of a node, in one frozen object: file, then environment, then flags, the later winning.

Another system of this kind grew 400 environment variables; here a setting is a flag or a line of ``cluster.yaml``, and
the few variables are those of DESIGN §3. Unknown keys are errors that name the nearest right one.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

DEFAULT_PORT = 8770
ROOT = Path(__file__).resolve().parent.parent
NODE_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")

ADDRESS = re.compile(r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})$")
MAX_PEERS = 64

# Flags of the contract that this version does not know: refused by name, for ignoring one would be worse.
LATER_FLAGS = ("--tls-cert", "--tls-key", "--tls-ca")


# Flags that are settings of the same name.
FLAGS = (
    "node_id", "host", "port", "advertise", "peers", "voter", "priority", "adopt", "data_dir", "log_dir", "journal",
    "resources", "worker",
)  # fmt: skip


class SettingsError(Exception):
    """A setting is wrong; the message names it, says what is wrong and what would be right."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QueueSettings(Section):
    """What bounds the queue and how long it remembers."""

    lease_seconds: float = Field(30, gt=1, description="how long a silent worker keeps its jobs")
    heartbeat_seconds: float = Field(5, gt=0.05, description="how often a worker renews its leases")

    @model_validator(mode="before")
    @classmethod
    def _heartbeat_follows_lease(cls, values: Any) -> Any:
        """A shorter lease alone means more frequent heartbeats too."""
        if isinstance(values, dict) and isinstance(values.get("lease_seconds"), int | float):
            return {"heartbeat_seconds": min(5.0, values["lease_seconds"] / 6), **values}
        return values

    @model_validator(mode="after")
    def _leases_outlive_heartbeats(self) -> QueueSettings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"heartbeat_seconds ({self.heartbeat_seconds:g}) must be at most half of lease_seconds "
                f"({self.lease_seconds:g}), or every job is given up between two heartbeats"
            )
        return self

    max_unfinished: int = Field(2_000_000, ge=1, description="submits beyond this many unfinished jobs get 429")
    keep_finished: int = Field(200_000, ge=0, description="finished jobs remembered; the oldest go first")
    keep_finished_hours: float = Field(24 * 14, gt=0, description="finished jobs older than this are forgotten")
    min_free_disk_mb: int = Field(256, ge=0, description="below this much free disk submits get 507")


class WorkerSettings(Section):
    """What this node offers and keeps as a worker."""

    max_jobs: int = Field(256, ge=1, le=10_000, description="jobs at once, whatever their requirements")
    claim_wait_seconds: float = Field(20, gt=0, le=60, description="how long a claim is held open")
    log_cap_mb: int = Field(16, ge=1, description="per stream of a job; the newest half is kept beyond it")
    drain_on_sigterm: bool = Field(
        False, description="SIGTERM means that the machine is going away: jobs end or move on before the node stops"
    )
    notice_seconds: float = Field(30, gt=0, le=86_400, description="with drain_on_sigterm: how long it may take")
    memory_policy: Literal["off", "warn", "kill"] = Field(
        "kill", description="for a job that uses more memory than its requires.memory_mb; placement gave that, no more"
    )
    memory_headroom: float = Field(1.0, ge=1, le=100, description="times requires.memory_mb is the limit")
    memory_cgroup: bool = Field(True, description="limits are held by cgroups where they may be made, else watched")
    keep_folders: int = Field(10_000, ge=0, description="folders of ended attempts kept; the oldest go first")
    keep_folders_hours: float = Field(24 * 7, gt=0, description="folders of ended attempts older than this go")
    gpu_sample_seconds: float = Field(5, gt=0, le=60, description="how often the GPUs are looked at")
    gpu_deadline_seconds: float = Field(10, gt=0, le=300, description="NVML silent for so long: no GPU is offered")
    gpu_memory_policy: Literal["warn", "kill"] = Field(
        "warn", description="for a job that uses more memory of a shared GPU than it asked for"
    )


class ReaperSettings(Section):
    """See `p2p.loops.job_loops.JobReaperConfig`."""

    interval_seconds: float = Field(5, gt=0)
    stale_job_threshold_seconds: float = Field(1800, gt=0, description="claimed for this long and never started")
    stuck_job_threshold_seconds: float = Field(3600, gt=0, description="in progress without a sign of life")
    gpu_idle_seconds: float = Field(600, gt=0, description="the same of a job with GPUs, before it is told as stalled")
    max_jobs_to_reap_per_cycle: int = Field(10, ge=1)


class PlacementSettings(Section):
    """Whose turn it is (docs/jobs.md; kinds' floors and preferences are in ``config/jobs.yaml``)."""

    group_weights: dict[str, float] = Field(default_factory=dict, description="group -> its weight; 1 if not named")
    preempt_gap: int = Field(
        20, ge=1, le=101, description="work of so much lower priority is asked to make way; 101: none ever is"
    )
    preempt_after_seconds: float = Field(5, ge=0, description="once a job has waited for room this long")

    @field_validator("group_weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name, weight in value.items() if not 0 < weight <= 1e6), None)
        if wrong is not None:
            raise ValueError(f"the weight of {wrong!r} must be more than 0, and at most a million")
        return value


class PopulatorSettings(Section):
    """When the queue is stocked; with what is ``config/jobs.yaml``."""

    enabled: bool = True
    interval_seconds: float = Field(10, gt=0)
    totals: dict[str, int] = Field(default_factory=dict, description="kind -> stop after this many were ever submitted")


class HealthSettings(Section):
    """When the queue is unhealthy (DESIGN §6)."""

    interval_seconds: float = Field(10, gt=0)
    queue_depth: int = Field(1000, ge=1, description="pending jobs, for over an hour")
    queue_depth_seconds: float = Field(3600, gt=0)
    stuck_jobs: int = Field(10, ge=0)
    failure_rate: float = Field(0.5, gt=0, le=1, description="of the last hour's finished jobs")
    failure_rate_least: int = Field(10, ge=1, description="finished jobs before the rate means anything")
    idle_seconds: float = Field(1800, gt=0, description="since the last completion, with work pending")


class ClusterSettings(Section):
    """How a cluster keeps itself (PROTOCOL §1, Timers; docs/runbooks/P2P_LEADER_FAILOVER.md)."""

    voter_target: int = Field(3, ge=1, le=7, description="voters the autopilot keeps; 1, 3, 5 or 7 make sense")
    profile: Literal["lan", "wan"] = Field("lan", description="wan: members more than 60 ms apart")
    preempt: bool = Field(True, description="a voter of higher priority gets the leadership back once it is steady")
    preempt_after_seconds: float = Field(30, ge=1, description="how long it must have been well; doubles each time")
    steady_seconds: float = Field(30, ge=0, description="how long a member must have been well to become a voter")
    young_steady_seconds: float = Field(5, ge=0, description="the same, while there are fewer voters than voter_target")
    replace_dead_after_seconds: float = Field(600, ge=5, description="a dead voter is replaced after this")
    max_clock_skew_seconds: float = Field(30, gt=0, description="whose clock is further off is refused at join")
    snapshot_entries: int = Field(50_000, ge=10, description="a snapshot is made after this many entries")
    keep_entries: int = Field(10_000, ge=0, description="entries kept behind a snapshot; who lacks more is sent one")

    @field_validator("voter_target")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd: {value} voters survive no more failures than {value - 1}")
        return value


class Settings(Section):
    """One node. Made by `load`; nothing else reads the environment for settings."""

    node_id: str
    host: str
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)
    advertise: str | None = Field(None, description="what peers dial; 'none': this node dials, nobody dials it")
    peers: tuple[str, ...] = Field((), description="addresses of live members to join through")
    voter: bool | None = Field(None, description="true: asks to vote; false: never votes; null: the autopilot decides")
    priority: int = Field(0, ge=-1_000, le=1_000, description="bully priority; the higher leads")
    adopt: bool = Field(False, description="this start may use a copied data directory, under a new disk id")
    data_dir: Path
    log_dir: Path = Path("logs")
    journal: str = "raft:"
    jobs_file: Path | None = None
    resources: Path | None = None
    worker: bool = True
    auth_token: SecretStr | None = Field(None, repr=False)
    start_wait_seconds: float = Field(30, ge=0, description="how long a start waits for its predecessor to end")
    cluster: ClusterSettings = ClusterSettings()
    queue: QueueSettings = QueueSettings()
    work: WorkerSettings = WorkerSettings()
    reaper: ReaperSettings = ReaperSettings()
    placement: PlacementSettings = PlacementSettings()
    populator: PopulatorSettings = PopulatorSettings()
    health: HealthSettings = HealthSettings()

    @field_validator("node_id")
    @classmethod
    def _plain_id(cls, value: str) -> str:
        if not NODE_ID.fullmatch(value):
            raise ValueError("use letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit")
        return value

    @field_validator("advertise")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None and value != "none" and not is_address(value):
            raise ValueError(f"must be HOST:PORT, such as gpu-07.example.org:8770, or none, not {value!r}")
        return value

    @field_validator("peers", mode="before")
    @classmethod
    def _many_peers(cls, value: Any) -> Any:
        peers = tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
        if isinstance(value, str) and not peers:  # an unset variable must not found a cluster of its own
            raise ValueError("is empty; a node that is to begin a cluster of its own is started without it")
        if isinstance(peers, list | tuple):
            wrong = next((peer for peer in peers if not isinstance(peer, str) or not is_address(peer)), None)
            if wrong is not None:
                raise ValueError(f"must be HOST:PORT,HOST:PORT,…; {wrong!r} is not HOST:PORT")
            if len(peers) > MAX_PEERS:
                raise ValueError(f"names at most {MAX_PEERS} members; any live one is enough to join through")
        return peers

    @field_validator("journal")
    @classmethod
    def _known_journal(cls, value: str) -> str:
        if value != "raft:":
            raise ValueError("this version has the journal 'raft:' only")
        return value

    @model_validator(mode="after")
    def _outbound_only_joins(self) -> Settings:
        if self.advertise == "none" and not self.peers:
            raise ValueError("advertise: a node that nobody can dial needs --peers to dial")
        return self

    @model_validator(mode="after")
    def _open_only_with_token(self) -> Settings:
        if self.auth_token is None and not is_loopback(self.host):
            raise ValueError(
                f"without a token a node listens on loopback only, and {self.host!r} is not; give --auth-token-file"
            )
        if self.auth_token is not None and len(self.auth_token.get_secret_value()) < 16:
            raise ValueError("the auth token must have at least 16 characters")
        return self


def is_address(text: str) -> bool:
    """Whether this is HOST:PORT."""
    match = ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 65_536


def is_loopback(host: str) -> bool:
    """Whether a listen address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parser() -> argparse.ArgumentParser:
    """The flags of ``scripts/p2p_orchestrator.py``. A default of None means: the file or the built-in default."""
    flags = argparse.ArgumentParser(
        prog="p2p_orchestrator.py",
        description="Start a node. With no flags: a one-node cluster on 127.0.0.1:8770 that does real work.",
    )
    flags.add_argument("--node-id", help="stable identity (P2P_NODE_ID; default: the hostname)")
    flags.add_argument("--host", help="listen address (default: 127.0.0.1 without a token, 0.0.0.0 with one)")
    flags.add_argument("--port", type=int, help=f"listen port (default {DEFAULT_PORT}; 0 = any free one)")
    flags.add_argument(
        "--advertise", metavar="HOST:PORT", help="what peers dial; none = nobody can dial this node, it dials them"
    )
    flags.add_argument("--peers", metavar="H:P,H:P", help="any live members to join through")
    flags.add_argument("--voter", action="store_true", dest="voter", default=None, help="ask to be a voter")
    flags.add_argument("--no-voter", action="store_false", dest="voter", default=None, help="never be a voter")
    flags.add_argument("--priority", type=int, help="bully priority; the higher leads (default 0)")
    flags.add_argument("--adopt", action="store_true", default=None, help="use a copied data directory, as a new disk")
    flags.add_argument("--data-dir", type=Path, help="journal, queue and job folders (default data/<node-id>)")
    flags.add_argument("--log-dir", type=Path, help="coordination.log and work_queue.log (default logs)")
    flags.add_argument("--config", type=Path, help="cluster.yaml (default config/cluster.yaml if there is one)")
    flags.add_argument("--jobs-file", type=Path, help="the kinds of jobs (default config/jobs.yaml)")
    flags.add_argument("--journal", help="raft: (the only one in this version)")
    flags.add_argument("--auth-token-file", type=Path, help="file with the cluster secret, readable by its owner only")
    flags.add_argument("--resources", type=Path, help="YAML that overrides what this node offers")
    flags.add_argument("--no-worker", action="store_false", dest="worker", default=None, help="run no jobs here")
    flags.add_argument("--no-populate", action="store_true", help="do not fill the queue by itself")
    return flags


def load(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of this start. Raises SettingsError."""
    env = os.environ if environment is None else environment
    for argument in arguments:
        if argument.partition("=")[0] in LATER_FLAGS:
            raise SettingsError(
                f"{argument.partition('=')[0]}: this version has no TLS of its own; use a tunnel or VPN"
            )
    flags = parser().parse_args(arguments)
    values = _from_file(_config_file(flags.config))
    for key, variable in (("node_id", "P2P_NODE_ID"),):
        if env.get(variable):
            values[key] = env[variable]
    for key in FLAGS:
        if getattr(flags, key) is not None:
            values[key] = getattr(flags, key)
    if flags.jobs_file is not None:
        values["jobs_file"] = flags.jobs_file
    if flags.no_populate:
        section = values.get("populator", {})
        if isinstance(section, dict):  # else `build` says what is wrong with it
            values["populator"] = {**section, "enabled": False}
    in_file = values.pop("auth_token_file", None)
    token = read_token(env, flags.auth_token_file)
    if token is None and in_file is not None:
        token = read_token({}, str(in_file))
    if token is not None:
        values["auth_token"] = SecretStr(token)
    values.setdefault("node_id", re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63] or "node")
    values.setdefault("host", "0.0.0.0" if token else "127.0.0.1")  # noqa: S104 - DESIGN §3: open only with a token
    values.setdefault("data_dir", Path("data") / str(values["node_id"]))
    if values.get("jobs_file") is None:
        values["jobs_file"] = next(
            (p for p in (Path("config/jobs.yaml"), ROOT / "config/jobs.yaml") if p.exists()), None
        )
    return build(values)


def build(values: dict[str, Any]) -> Settings:
    """Settings from plain values. Raises SettingsError naming the setting."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in problem["loc"]) or "settings"
        sentence = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            sentence = f"there is no such setting{_nearest(problem['loc'])}"
        raise SettingsError(f"{where}: {sentence}") from None


def _nearest(location: tuple[int | str, ...]) -> str:
    section: Any = Settings
    for step in location[:-1]:
        section = section.model_fields[str(step)].annotation
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _config_file(named: Path | None) -> Path | None:
    if named is not None:
        if not named.exists():
            raise SettingsError(f"--config: there is no file {named}")
        return named
    default = Path("config/cluster.yaml")
    return default if default.exists() else None


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise SettingsError(f"{path}: must be a mapping of settings")
    if "auth_token" in body:
        raise SettingsError(f"{path}: auth_token does not belong in this file; use auth_token_file")
    return body


def read_token(env: Mapping[str, str], path: Path | str | None) -> str | None:
    """The cluster secret: the flag's file, then RINGRIFT_CLUSTER_AUTH_TOKEN_FILE, then RINGRIFT_CLUSTER_AUTH_TOKEN."""
    path = path or env.get("RINGRIFT_CLUSTER_AUTH_TOKEN_FILE")
    if path is None:
        return env.get("RINGRIFT_CLUSTER_AUTH_TOKEN") or None
    file = Path(path)
    try:
        token = file.read_text(encoding="utf-8").strip()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not text"
        raise SettingsError(f"auth token file {file}: {why}") from None
    if mode & 0o077:
        raise SettingsError(f"auth token file {file} can be read by others; run: chmod 600 {file}")
    if not token:
        raise SettingsError(f"auth token file {file} is empty")
    return token
