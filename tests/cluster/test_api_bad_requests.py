"""Bad input gets a clear error and changes nothing (DESIGN §8.7): a table, broken HTTP, and a seeded fuzz."""

from __future__ import annotations

import copy
import http.client
import json
import random
import re
import socket
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest

from tests.nodes import NodeProcess

MSGPACK = {"Content-Type": "application/msgpack"}
DEEP = 2_000


@dataclass(frozen=True)
class Bad:
    """One malformed request and the whole of what it must be told: status, field, and words of the detail."""

    id: str
    status: int
    field: str | None
    says: str
    method: str = "POST"
    path: str = "/jobs"
    body: Any = None
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


def job(**more: Any) -> dict[str, Any]:
    return {"command": ["true"], **more}


def needs(**more: Any) -> dict[str, Any]:
    return job(requires=more)


def batch(*jobs: Any) -> dict[str, Any]:
    return {"jobs": list(jobs)}


def in_job(id: str, field: str, says: str, **more: Any) -> Bad:
    return Bad(f"job-{id}", 422, field, says, body=job(**more))


def in_needs(id: str, name: str, says: str, value: Any, **more: Any) -> Bad:
    return Bad(f"requires-{id}", 422, f"requires.{name}", says, body=needs(**{name: value}, **more))


def to(path: str, id: str, field: str | None, says: str, body: Any, status: int = 422) -> Bad:
    return Bad(f"{path.strip('/').replace('/', '-')}-{id}", status, field, says, path=path, body=body)


def get(id: str, field: str | None, says: str, path: str, status: int = 422) -> Bad:
    return Bad(f"get-{id}", status, field, says, method="GET", path=path)


def raw(id: str, says: str, text: bytes, status: int = 400, **more: Any) -> Bad:
    return Bad(f"body-{id}", status, more.pop("field", "(body)"), says, raw=text, **more)


def packed(id: str, says: str, value: Any, status: int = 400, field: str = "(body)") -> Bad:
    text = value if isinstance(value, bytes) else msgpack.packb(value)
    return Bad(f"msgpack-{id}", status, field, says, raw=text, headers=MSGPACK)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


WORKER = {"worker": "w1", "resources": {"cpus": 1}}
BEAT = {"id": "x", "attempt": 1}
REPORT = {"id": "x", "attempt": 1, "worker": "w1"}
NO_JOB = "1m0000000000000000000"

JOBS = [
    in_job("unknown-field", "comand", "did you mean 'command'", comand=["true"]),
    in_job("unknown-field-far", "zzz", "there is no such field", zzz=1),
    in_job("field-of-the-record", "state", "there is no such field", state="running"),
    Bad("job-nothing", 422, "command", "needs a command", body={}),
    Bad("job-null-command", 422, "command", "needs a command", body={"command": None}),
    Bad("job-command-text", 422, "command", "list of arguments", body={"command": "echo hi"}),
    Bad("job-command-empty", 422, "command", "at least 1", body={"command": []}),
    Bad("job-command-number", 422, "command[1]", "string", body={"command": ["echo", 7]}),
    Bad("job-command-null", 422, "command[0]", "string", body={"command": [None]}),
    Bad("job-command-object", 422, "command", "list", body={"command": {"0": "true"}}),
    Bad("job-command-nul", 422, "command[1]", "NUL", body={"command": ["echo", "a\0b"]}),
    Bad("job-command-surrogate", 422, "command[1]", "surrogate", body={"command": ["echo", "\ud800"]}),
    Bad("job-command-low-surrogate", 422, "command[0]", "surrogate", body={"command": ["\udcff"]}),
    Bad("job-argument-too-long", 422, "command[1]", "131071 bytes", body={"command": ["echo", "é" * 65_536]}),
    Bad("job-too-many-arguments", 422, "command", "at most 1000", body={"command": ["x"] * 1_001}),
    Bad("job-over-a-mebibyte", 422, "(body)", "1048576 bytes", body={"command": ["x" * 2_000] * 600}),
    Bad("job-escapes-over-a-mebibyte", 422, "(body)", "1048576 bytes", body={"command": ["é" * 50_000] * 4}),
    in_job("kind-unknown", "kind", "did you mean 'selfplay'", kind="selfpaly"),
    in_job("kind-unknown-far", "kind", "known kinds: ", kind="xyzzy"),
    in_job("kind-empty", "kind", "at least 1", kind=""),
    in_job("kind-spaces", "kind", "pattern", kind="a b"),
    in_job("kind-number", "kind", "string", kind=5),
    in_job("kind-null", "kind", "string", kind=None),
    in_job("kind-newline", "kind", "pattern", kind="selfplay\n"),
    Bad("job-kind-without-command", 422, "command", "'training' has no command", body={"kind": "training"}),
    Bad(
        "job-params-unknown",
        422,
        "params.gmae",
        "did you mean 'game'",
        body={"kind": "selfplay", "params": {"gmae": 1}},
    ),
    Bad("job-params-unknown-far", 422, "params.qq", "it takes game", body={"kind": "selfplay", "params": {"qq": 1}}),
    in_job("params-list", "params", "dictionary", params=[]),
    in_job("params-nested", "params.a", "string", params={"a": {}}),
    in_job("params-null", "params.a", "string", params={"a": None}),
    in_job("params-named-like-a-type", "params.int", "string", params={"int": []}),
    in_job("params-bad-name", "params.a b", "pattern", params={"a b": 1}),
    in_job("params-empty-name", "params", "at least 1", params={"": 1}),
    in_job("params-huge-number", "params.n", "64 bits", params={"n": 10**30}),
    in_job("params-surrogate", "params.n", "surrogate", params={"n": "\udfff"}),
    in_job("params-nul", "params.n", "NUL", params={"n": "\0"}),
    in_job("params-too-many", "params", "at most 100", params={f"p{n}": n for n in range(101)}),
    in_job("priority-low", "priority", "greater than or equal to 0", priority=-1),
    in_job("priority-high", "priority", "less than or equal to 100", priority=101),
    in_job("priority-huge", "priority", "less than or equal to 100", priority=10**4_000),
    in_job("priority-text", "priority", "integer", priority="50"),
    in_job("priority-fraction", "priority", "integer", priority=50.5),
    in_job("priority-bool", "priority", "not true or false", priority=True),
    in_job("group-slash-first", "group", "pattern", group="/x"),
    in_job("group-too-long", "group", "at most 64", group="x" * 65),
    in_job("timeout-zero", "timeout_seconds", "greater than 0", timeout_seconds=0),
    in_job("timeout-negative", "timeout_seconds", "greater than 0", timeout_seconds=-1),
    in_job("timeout-text", "timeout_seconds", "number", timeout_seconds="1h"),
    in_job("timeout-too-long", "timeout_seconds", "less than or equal to 2592000", timeout_seconds=1e9),
    in_job("timeout-overflow", "timeout_seconds", "number", timeout_seconds=10**400),
    in_job("attempts-zero", "max_attempts", "greater than or equal to 1", max_attempts=0),
    in_job("attempts-many", "max_attempts", "less than or equal to 100", max_attempts=1_000),
    in_job("attempts-list", "max_attempts", "integer", max_attempts=[3]),
    in_job("backoff-negative", "retry_backoff_seconds", "greater than or equal", retry_backoff_seconds=-0.1),
    in_job("backoff-long", "retry_backoff_seconds", "less than or equal to 600", retry_backoff_seconds=601),
    in_job("depends-text", "depends_on", "list", depends_on="abc"),
    in_job("depends-number", "depends_on[0]", "string", depends_on=[7]),
    in_job("depends-empty-id", "depends_on[0]", "at least 1", depends_on=[""]),
    in_job("depends-long-id", "depends_on[1]", "at most 64", depends_on=["a", "b" * 65]),
    in_job("depends-many", "depends_on", "at most 1000", depends_on=["a"] * 1_001),
    in_job("depends-unknown", "depends_on[0]", f"no job '{NO_JOB}'", depends_on=[NO_JOB]),
    in_job("depends-nul", "depends_on[0]", "there is no job", depends_on=["\0"]),
    in_job("depends-surrogate", "depends_on[0]", "unicode", depends_on=["\ud800"]),
    in_job("depends-on-a-batch-number", "depends_on[0]", "this is a single job", depends_on=["#0"]),
    in_job("unique-key-empty", "unique_key", "at least 1", unique_key=""),
    in_job("unique-key-long", "unique_key", "at most 200", unique_key="k" * 201),
    in_job("unique-key-nul", "unique_key", "NUL", unique_key="a\0"),
    in_job("unique-key-surrogate", "unique_key", "surrogate", unique_key="\ud812"),
    in_job("unique-key-number", "unique_key", "string", unique_key=1),
    in_job("not-before-words", "not_before", "ISO 8601", not_before="tomorrow"),
    in_job("not-before-no-offset", "not_before", "UTC offset", not_before="2026-01-31T08:00:00"),
    in_job("not-before-ancient", "not_before", "greater than or equal to 0", not_before="0001-01-01T00:00:00+23:59"),
    in_job("not-before-far", "not_before", "less than or equal", not_before=1e12),
    in_job("not-before-surrogate", "not_before", "ISO 8601", not_before="\ud800"),
    in_job("nodes-zero", "nodes", "greater than or equal to 1", nodes=0),
    in_job("nodes-many", "nodes", "less than or equal to 1000", nodes=1_001),
    in_job("env-list", "env", "dictionary", env=["A=1"]),
    in_job("env-number", "env.A", "string", env={"A": 1}),
    in_job("env-named-like-a-type", "env.str", "string", env={"str": 1}),
    in_job("env-equals", "env", "'A=B' is not an environment variable", env={"A=B": "1"}),
    in_job("env-digit-first", "env", "'1A' is not", env={"1A": "1"}),
    in_job("env-newline", "env", "is not an environment variable", env={"A\n": "1"}),
    in_job("env-empty-name", "env", "is not an environment variable", env={"": "1"}),
    in_job("env-reserved", "env", "'P2P_JOB_ID' is set by the node", env={"P2P_JOB_ID": "x"}),
    in_job("env-reserved-gpus", "env", "set by the node", env={"CUDA_VISIBLE_DEVICES": "0"}),
    in_job("env-reserved-token", "env", "set by the node", env={"RINGRIFT_CLUSTER_AUTH_TOKEN": "x"}),
    in_job("env-nul", "env.A", "NUL", env={"A": "\0"}),
    in_job("env-surrogate", "env.A", "surrogate", env={"A": "\udc80"}),
    in_job("env-too-many", "env", "at most 200", env={f"V{n}": "" for n in range(201)}),
    in_job("cwd-relative", "cwd", "absolute", cwd="runs"),
    in_job("cwd-empty", "cwd", "at least 1", cwd=""),
    in_job("cwd-nul", "cwd", "NUL", cwd="/a\0"),
    in_job("cwd-long", "cwd", "at most 4096", cwd="/" + "x" * 4_096),
    in_job("grace-negative", "grace_seconds", "greater than or equal", grace_seconds=-1),
    in_job("grace-long", "grace_seconds", "less than or equal to 3600", grace_seconds=3_601),
    in_job("fence-unknown", "fence", "'attempt' or 'strict'", fence="loose"),
    in_job("requires-list", "requires", "dictionary|object|Requires", requires=[]),
    in_needs("unknown", "gpu", "did you mean 'gpus'", 1),
    in_needs("gpus-negative", "gpus", "greater than or equal to 0", -1),
    in_needs("gpus-fraction", "gpus", "integer", 0.5),
    in_needs("gpus-bool", "gpus", "not true or false", True),
    in_needs("gpus-many", "gpus", "less than or equal to 64", 65),
    in_needs("cpus-text", "cpus", "number", "4"),
    in_needs("cpus-huge", "cpus", "less than or equal to 10000|number", 10**400),
    in_needs("memory-negative", "memory_mb", "greater than or equal to 0", -1),
    in_needs("memory-fraction", "memory_mb", "integer", 1.5),
    in_needs("disk-huge", "disk_mb", "less than or equal", 10**12),
    in_needs("share-zero", "gpu_share", "greater than 0", 0, gpus=1),
    in_needs("share-of-two", "gpu_share", "needs gpus: 1", 0.5, gpus=2),
    in_needs("model-not-a-pattern", "gpu_model", "is not a pattern", "A100(", gpus=1),
    in_needs("model-repeats-too-often", "gpu_model", "is not a pattern", "a{99999999999}", gpus=1),
    in_needs("model-runs-away", "gpu_model", "repeats too much", "(a+)+$", gpus=1),
    in_needs("model-runs-away-slowly", "gpu_model", "repeats too much", ".*.*.*.*.*x", gpus=1),
    in_needs("model-empty", "gpu_model", "at least 1", "", gpus=1),
    in_needs("capability-number", "min_compute_capability", "string", 8.0, gpus=1),
    in_needs("capability-words", "min_compute_capability", "pattern", "ampere", gpus=1),
    in_needs("labels-list", "labels", "dictionary", ["zone"]),
    in_needs("node-spaces", "node", "pattern", "my node"),
    Bad("requires-label-number", 422, "requires.labels.zone", "string", body=needs(labels={"zone": 1})),
    Bad("requires-label-name", 422, "requires.labels.a b", "pattern", body=needs(labels={"a b": "c"})),
]

BATCHES = [
    Bad("batch-empty", 422, "jobs", "is empty", body=batch()),
    Bad("batch-empty-and-long", 422, "jobs", "is empty", raw=b'{"jobs": [' + b" " * 70_000 + b"]}"),
    Bad("batch-object", 422, "jobs", "list of jobs", body={"jobs": {}}),
    Bad("batch-null", 422, "jobs", "list of jobs", body={"jobs": None}),
    Bad("batch-and-more", 422, "kind", 'one field "jobs"', body={"jobs": [job()], "kind": "command"}),
    Bad("batch-of-numbers", 422, "jobs[0]", "", body=batch(1)),
    Bad("batch-of-nulls", 422, "jobs[1]", "", body=batch(job(), None)),
    Bad("batch-second-is-bad", 422, "jobs[1].priority", "integer", body=batch(job(), job(priority="x"))),
    Bad("batch-unknown-field", 422, "jobs[2].gruop", "did you mean 'group'", body=batch(job(), job(), job(gruop="x"))),
    Bad("batch-deep-field", 422, "jobs[0].requires.gpus", "integer", body=batch(needs(gpus="1"))),
    Bad("batch-unknown-kind", 422, "jobs[1].kind", "no kind", body=batch(job(), {"kind": "nope"})),
    Bad("batch-job-too-large", 422, "jobs[1]", "1048576", body=batch(job(), {"command": ["x" * 2_000] * 600})),
    Bad("batch-own-dependency", 422, "jobs[0].depends_on[0]", "a cycle", body=batch(job(depends_on=["#0"]))),
    Bad(
        "batch-later-dependency", 422, "jobs[0].depends_on[0]", "comes after", body=batch(job(depends_on=["#1"]), job())
    ),
    Bad(
        "batch-cycle",
        422,
        "jobs[0].depends_on[0]",
        "cycles",
        body=batch(job(depends_on=["#1"]), job(depends_on=["#0"])),
    ),
    Bad("batch-no-such-number", 422, "jobs[1].depends_on[0]", "#0 to #1", body=batch(job(), job(depends_on=["#9"]))),
    Bad("batch-negative-number", 422, "jobs[1].depends_on[0]", "not a job", body=batch(job(), job(depends_on=["#-1"]))),
    Bad("batch-bare-hash", 422, "jobs[1].depends_on[0]", "not a job", body=batch(job(), job(depends_on=["#"]))),
    Bad(
        "batch-arabic-digit", 422, "jobs[1].depends_on[0]", "not a job", body=batch(job(), job(depends_on=["#\u0660"]))
    ),
    Bad("batch-unknown-id", 422, "jobs[1].depends_on[0]", "no job", body=batch(job(), job(depends_on=[NO_JOB]))),
    Bad("batch-of-one-unknown-id", 422, "jobs[0].depends_on[0]", "no job", body=batch(job(depends_on=[NO_JOB]))),
    Bad("batch-too-many", 422, "jobs", "at most 10000", body=batch(*[{}] * 10_001)),
    Bad("batch-too-many-valid", 422, "jobs", "at most 10000", body=batch(*[job()] * 10_001)),
    packed("batch-too-many", "at most 10000", batch(*[{}] * 10_001), 422, "jobs"),
    raw("long-batch-breaks-off", "not JSON", b'{"jobs": [' + b'{"command":["true"]},' * 4_000),
    raw("long-batch-comma-at-end", "not JSON", b'{"jobs": [' + b'{"command":["true"]},' * 4_000 + b"]}"),
    raw("long-batch-no-comma", "expected ','", b'{"jobs": [' + b'{"command":["true"]} ' * 4_000 + b"]}"),
    raw(
        "long-batch-tail",
        'one field "jobs"',
        b'{"jobs": [' + b",".join([b'{"command":["true"]}'] * 4_000) + b'], "a":1}',
    ),
    raw("long-batch-not-utf-8", "UTF-8", b'{"jobs": [' + b" " * 70_000 + b'{"command":["\xff"]}]}'),
    raw("long-batch-deep", "64 levels", b'{"jobs": [' + b" " * 70_000 + b"[" * 90 + b"]" * 90 + b"]}"),
]

BODIES = [
    raw("list", 'a batch is {"jobs"', b"[]"),
    raw("text", "must be an object", b'"hello"'),
    raw("number", "must be an object", b"7"),
    raw("null", "must be an object", b"null"),
    raw("half", "not JSON", b'{"command": ["true"'),
    raw("two", "not JSON", b'{"command": ["true"]} {}'),
    raw("single-quotes", "not JSON", b"{'command': ['true']}"),
    raw("form", "not JSON", b"command=true"),
    raw("nul", "not JSON", b"\0"),
    raw("bom", "not JSON", b"\xef\xbb\xbf{}"),
    raw("utf-16", "UTF-8|JSON", json.dumps(job()).encode("utf-16")),
    raw("latin-1", "UTF-8: .* at byte 13", '{"command":["é"]}'.encode("latin-1")),
    raw("nan", "NaN is not JSON", b'{"command":["true"],"priority":NaN}'),
    raw("infinity", "Infinity is not JSON", b'{"command":["true"],"timeout_seconds":Infinity}'),
    raw("minus-infinity", "-Infinity is not JSON", b'{"command":["true"],"timeout_seconds":-Infinity}'),
    raw("overflowing-float", "number", b'{"command":["true"],"timeout_seconds":1e999}', 422, field="timeout_seconds"),
    raw("number-of-5000-digits", "not JSON", b'{"command":["true"],"priority":' + b"9" * 5_000 + b"}"),
    raw("control-character", "not JSON", b'{"command":["a\nb"]}'),
    raw("bad-escape", "not JSON", b'{"command":["\\x41"]}'),
    raw("deep", "nested too deeply", b"[" * DEEP + b"]" * DEEP),
    raw("deep-objects", "nested too deeply", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    raw("rather-deep", "64 levels", b'{"command":' + b"[" * 100 + b"]" * 100 + b"}"),
    raw("over-16-mebibytes", "at most 16777216", b" " * ((16 << 20) + 1), 413),
    raw("not-gzip", "cannot be read", b"plain", headers={"Content-Encoding": "gzip"}),
    packed("half", "not msgpack", msgpack.packb(job())[:-1]),
    packed("two", "not msgpack", msgpack.packb(job()) * 2),
    packed("reserved-byte", "not msgpack", b"\xc1"),
    packed("giant-array-header", "not msgpack", b"\xdd\xff\xff\xff\xff"),
    packed("giant-string-header", "not msgpack", b"\xdb\xff\xff\xff\xff"),
    packed("number-keys", "not msgpack", {1: 2}),
    packed("ext", "not msgpack", msgpack.ExtType(5, b"abc")),
    packed("timestamp", "not msgpack", msgpack.Timestamp(1)),
    packed("bad-utf-8", "not msgpack", b"\x81\xa7command\x91\xa2\xff\xfe"),
    packed("deep", "not msgpack", b"\x91" * DEEP + b"\xc0"),
    packed("rather-deep", "64 levels", {"command": nested(100)}),
    packed("list", "must be an object", []),
    packed("nil", "must be an object", None),
    packed("bytes-for-text", "string", {"command": [b"true"]}, 422, "command[0]"),
    packed("bytes-for-a-kind", "string", {"command": ["true"], "kind": b"command"}, 422, "kind"),
    packed("bytes-for-a-key", "strings", {b"command": ["true"]}, 422, "b'command'"),
    packed("empty-ext", "list", b"\x81\xa7command\xc7\x00\x05", 422, "command"),
    packed("nan", "finite", {"command": ["true"], "timeout_seconds": float("nan")}, 422, "timeout_seconds"),
    packed("infinity", "finite", {"command": ["true"], "grace_seconds": float("inf")}, 422, "grace_seconds"),
    raw("json-said-to-be-msgpack", "not msgpack", b'{"command": ["true"]}', headers=MSGPACK),
    raw("msgpack-said-to-be-json", "JSON|UTF-8", msgpack.packb(job())),
]


def typed(id: str, content_type: str) -> Bad:
    kind = {"Content-Type": content_type}
    return Bad(f"type-{id}", 415, "Content-Type", "application/json", raw=b'{"command":["true"]}', headers=kind)


def keyed(id: str, key: str, says: str = "1 to 200 printable ASCII") -> Bad:
    return Bad(f"key-{id}", 422, "Idempotency-Key", says, body=job(), headers={"Idempotency-Key": key})


HEADERS = [
    typed("form", "application/x-www-form-urlencoded"),
    typed("multipart", "multipart/form-data; boundary=x"),
    typed("plain", "text/plain"),
    typed("none", ""),
    typed("garbage", "/;;,"),
    typed("json-like", "application/json-patch+json"),
    keyed("empty", ""),
    keyed("long", "k" * 201),
    keyed("tab", "a\tb"),
    keyed("latin-1", "clé"),
    Bad("expect", 417, "Expect", "100-continue", body=job(), headers={"Expect": "a miracle"}),
    Bad("host-of-another", 403, "Host", "host name", body=job(), headers={"Host": "rebind.example:8770"}),
    Bad("host-broken", 403, "Host", "host name", method="GET", headers={"Host": "[::1"}),
    Bad("origin-broken", 403, "Origin", "other sites", method="GET", headers={"Origin": "http://[::1"}),
]

UNKNOWN = "there is no such page"
PATHS = [
    get("nowhere", None, UNKNOWN, "/nowhere", 404),
    get("job-below", None, UNKNOWN, f"/jobs/{NO_JOB}/x", 404),
    get("slash-at-the-end", None, UNKNOWN, "/jobs/", 404),
    get("dots", None, UNKNOWN, "/jobs/../../etc/passwd", 404),
    get("encoded-dots", None, UNKNOWN, "/%2e%2e/%2e%2e/etc/passwd", 404),
    get("nul-path", None, UNKNOWN, "/%00", 404),
    get("job-unknown", "id", "there is no job", f"/jobs/{NO_JOB}", 404),
    get("job-nul", "id", "there is no job", "/jobs/%00", 404),
    get("job-encoded-slash", "id", "there is no job", "/jobs/%2e%2e%2f%2e%2e%2fraft.db", 404),
    get("job-not-utf-8", "id", "there is no job", "/jobs/%ff%fe", 404),
    get("job-surrogate", "id", "there is no job", "/jobs/%ED%A0%80", 404),
    get("job-half-an-escape", "id", "there is no job", "/jobs/%zz%4", 404),
    get("job-newline", "id", "there is no job", "/jobs/a%0d%0aX-Evil:%201", 404),
    get("job-sql", "id", "there is no job", "/jobs/'%20OR%201=1--", 404),
    get("job-huge-id", "id", "there is no job 'x+'", "/jobs/" + "x" * 7_000, 404),
    get("job-emoji", "id", "there is no job", "/jobs/%F0%9F%A6%80", 404),
    get("logs-unknown", "id", "there is no job", f"/jobs/{NO_JOB}/logs", 404),
    get("logs-stream", "stream", "stdout, stderr", f"/jobs/{NO_JOB}/logs?stream=both"),
    get("logs-follow", "follow", "0, 1", f"/jobs/{NO_JOB}/logs?follow=yes"),
    get("logs-tail", "tail", "whole number", f"/jobs/{NO_JOB}/logs?tail=-5"),
    get("logs-tail-huge", "tail", "whole number", f"/jobs/{NO_JOB}/logs?tail={'9' * 400}"),
    get("logs-attempt", "attempt", "whole number", f"/jobs/{NO_JOB}/logs?attempt=0"),
    get("logs-offset-huge", "offset", "whole number", f"/jobs/{NO_JOB}/logs?offset={'9' * 400}"),
    get("logs-twice", "limit", "more than once", f"/jobs/{NO_JOB}/logs?limit=1&limit=2"),
    get("list-state", "state", "must be one of waiting, pending", "/jobs?state=done"),
    get("list-kind", "kind", "did you mean", "/jobs?kind=selfpaly"),
    get("list-limit-zero", "limit", "1 to 1000", "/jobs?limit=0"),
    get("list-limit-large", "limit", "1 to 1000", "/jobs?limit=1001"),
    get("list-limit-sign", "limit", "whole number", "/jobs?limit=%2B5"),
    get("list-limit-fraction", "limit", "whole number", "/jobs?limit=1.5"),
    get("list-limit-empty", "limit", "whole number", "/jobs?limit="),
    get("list-limit-arabic", "limit", "whole number", "/jobs?limit=%D9%A3"),
    get("list-cursor-words", "cursor", "whole number", "/jobs?cursor=abc"),
    get("list-cursor-negative", "cursor", "whole number", "/jobs?cursor=-1"),
    get("list-cursor-huge", "cursor", "whole number", "/jobs?cursor=99999999999999999999"),
    get("list-twice", "state", "more than once", "/jobs?state=pending&state=failed"),
    get("list-unknown", "stat", "state, kind", "/jobs?stat=pending"),
    get("consistency", "consistency", "linearizable, stale", "/jobs?consistency=eventual"),
    get("consistency-twice", "consistency", "more than once", "/status?consistency=stale&consistency=stale"),
    get("min-index", "min_index", "whole number", "/status?min_index=new"),
    get("status-unknown", "verbose", "no such parameter", "/status?verbose=1"),
    get("queue-unknown", "x", "no such parameter", "/work_queue_status?x=1"),
    get("assignment-unknown", "x", "no such parameter", "/work_assignment_status?x=1"),
    get("nodes-unknown", "x", "no such parameter", "/nodes?x=1"),
    get("stuck-nan", "threshold_seconds", "number", "/work_queue/stuck?threshold_seconds=nan"),
    get("stuck-negative", "threshold_seconds", "number", "/work_queue/stuck?threshold_seconds=-1"),
    get("stuck-underscore", "threshold_seconds", "number", "/work_queue/stuck?threshold_seconds=1_0"),
    get("stuck-infinity", "threshold_seconds", "number", "/work_queue/stuck?threshold_seconds=1e99"),
    get("failures-limit", "limit", "1 to 1000", "/work_queue/failures?limit=0"),
    get("events-after", "after", "whole number", "/events?after=-1"),
    get("events-unknown", "since", "no such parameter", "/events?since=1"),
    Bad("events-last-id", 422, "Last-Event-ID", "number", method="GET", path="/events", headers={"Last-Event-ID": "x"}),
    Bad("submit-query", 422, "dry_run", "no such parameter", path="/jobs?dry_run=1", body=job()),
    Bad("method-delete", 405, None, "allowed: ", method="DELETE", path=f"/jobs/{NO_JOB}"),
    Bad("method-put", 405, None, "allowed: ", method="PUT", path="/jobs"),
    Bad("method-get-of-a-verb", 405, None, "allowed: POST", method="GET", path="/work_queue/clear"),
    Bad("method-post-of-a-page", 405, None, "allowed: ", path="/status", body={}),
    Bad("method-head-of-events", 405, None, "allowed: GET", method="OPTIONS", path="/events"),
    to(f"/jobs/{NO_JOB}/cancel", "unknown", "id", "there is no job", {}, 404),
    to(f"/jobs/{NO_JOB}/release", "unknown", "id", "there is no job", {}, 404),
    to(f"/jobs/{NO_JOB}/retry", "unknown", "id", "there is no job", {}, 404),
    to(f"/jobs/{NO_JOB}/explode", "verb", None, UNKNOWN, {}, 404),
    to("/jobs/x/cancel", "reason-number", "reason", "string", {"reason": 5}),
    to("/jobs/x/cancel", "reason-empty", "reason", "at least 1", {"reason": ""}),
    to("/jobs/x/cancel", "reason-lines", "reason", "printable", {"reason": "a\nb"}),
    to("/jobs/x/cancel", "reason-long", "reason", "at most 500", {"reason": "x" * 501}),
    to("/jobs/x/cancel", "unknown-field", "raeson", "did you mean 'reason'", {"raeson": "x"}),
    to("/jobs/x/cancel", "list", "(body)", "must be an object, not a list", [], 400),
]

WORKERS = [
    to("/worker/claim", "nothing", "worker", "is required", {}),
    to("/worker/claim", "no-resources", "resources", "is required", {"worker": "w1"}),
    to("/worker/claim", "name", "worker", "pattern", {**WORKER, "worker": "my worker"}),
    to("/worker/claim", "name-number", "worker", "string", {**WORKER, "worker": 1}),
    to("/worker/claim", "unknown", "wait_second", "did you mean 'wait_seconds'", {**WORKER, "wait_second": 1}),
    to("/worker/claim", "wait-long", "wait_seconds", "less than or equal to 60", {**WORKER, "wait_seconds": 61}),
    to("/worker/claim", "wait-negative", "wait_seconds", "greater than", {**WORKER, "wait_seconds": -1}),
    to("/worker/claim", "jobs-negative", "max_jobs", "greater than", {**WORKER, "max_jobs": -1}),
    to("/worker/claim", "jobs-fraction", "max_jobs", "integer", {**WORKER, "max_jobs": 1.5}),
    to("/worker/claim", "cpus", "resources.cpus", "number", {"worker": "w1", "resources": {"cpus": "all"}}),
    to("/worker/claim", "gpu", "resources.gpus[0].uuid", "is required", {"worker": "w1", "resources": {"gpus": [{}]}}),
    to(
        "/worker/claim",
        "gpu-share",
        "resources.gpus[0].share_free",
        "less than or equal to 1",
        {"worker": "w1", "resources": {"gpus": [{"uuid": "a", "share_free": 2}]}},
    ),
    to(
        "/worker/claim",
        "gpus-many",
        "resources.gpus",
        "at most 64",
        {"worker": "w1", "resources": {"gpus": [{"uuid": str(n)} for n in range(65)]}},
    ),
    to("/worker/heartbeat", "nothing", "worker", "is required", {}),
    to("/worker/heartbeat", "no-jobs", "jobs", "is required", {"worker": "w1"}),
    to("/worker/heartbeat", "jobs-object", "jobs", "list", {"worker": "w1", "jobs": {}}),
    to("/worker/heartbeat", "ids-only", "jobs[0]", "", {"worker": "w1", "jobs": ["a"]}),
    to("/worker/heartbeat", "no-attempt", "jobs[0].attempt", "is required", {"worker": "w1", "jobs": [{"id": "x"}]}),
    to(
        "/worker/heartbeat",
        "attempt-zero",
        "jobs[1].attempt",
        "greater than or equal to 1",
        {"worker": "w1", "jobs": [BEAT, {**BEAT, "attempt": 0}]},
    ),
    to(
        "/worker/heartbeat",
        "attempt-huge",
        "jobs[0].attempt",
        "less than or equal",
        {"worker": "w1", "jobs": [{**BEAT, "attempt": 1 << 63}]},
    ),
    to(
        "/worker/heartbeat",
        "progress-large",
        "jobs[0].progress",
        "at most 65536 bytes",
        {"worker": "w1", "jobs": [{**BEAT, "progress": "x" * 70_000}]},
    ),
    to("/worker/heartbeat", "many", "jobs", "at most 10000", {"worker": "w1", "jobs": [BEAT] * 10_001}),
    Bad(
        "worker-heartbeat-progress-nan",
        422,
        "jobs[0].progress",
        "not JSON",
        path="/worker/heartbeat",
        raw=msgpack.packb({"worker": "w1", "jobs": [{**BEAT, "progress": float("nan")}]}),
        headers=MSGPACK,
    ),
    Bad(
        "worker-heartbeat-progress-bytes",
        422,
        "jobs[0].progress",
        "not JSON",
        path="/worker/heartbeat",
        raw=msgpack.packb({"worker": "w1", "jobs": [{**BEAT, "progress": {"a": b"b"}}]}),
        headers=MSGPACK,
    ),
    to("/worker/complete", "nothing", "id", "is required", {}),
    to("/worker/complete", "unknown-job", "id", "there is no job", REPORT, 404),
    to("/worker/complete", "exit-code", "exit_code", "0", {**REPORT, "exit_code": 1}),
    to("/worker/complete", "error", "error", "no such field", {**REPORT, "error": "x"}),
    to("/worker/complete", "result-large", "result", "at most 1048576 bytes", {**REPORT, "result": "x" * 1_100_000}),
    to("/worker/complete", "items-empty", "items", "at least 1", {"items": []}),
    to("/worker/complete", "items-number", "items", "list", {"items": 5}),
    to("/worker/complete", "items-bad", "items[0].attempt", "integer", {"items": [{**REPORT, "attempt": "1"}]}),
    to("/worker/complete", "items-and-more", "id", "no such field", {"items": [REPORT], "id": "x"}),
    to("/worker/complete", "items-many", "items", "at most 10000", {"items": [REPORT] * 10_001}),
    to("/worker/complete", "started-far", "started_at", "less than or equal", {**REPORT, "started_at": 1e300}),
    Bad(
        "worker-complete-result-bytes",
        422,
        "items[0].result",
        "not JSON",
        path="/worker/complete",
        raw=msgpack.packb({"items": [{**REPORT, "result": [b"x"]}]}),
        headers=MSGPACK,
    ),
    to("/worker/fail", "no-error", "error", "is required", REPORT),
    to("/worker/fail", "error-empty", "error", "at least 1", {**REPORT, "error": ""}),
    to("/worker/fail", "error-surrogate", "error", "unicode", {**REPORT, "error": "\ud800"}),
    to(
        "/worker/fail",
        "exit-code-huge",
        "exit_code",
        "less than or equal to 255",
        {**REPORT, "error": "x", "exit_code": 256},
    ),
    to("/worker/fail", "retryable-text", "retryable", "boolean", {**REPORT, "error": "x", "retryable": "no"}),
    to("/worker/fail", "cause", "cause", "pattern", {**REPORT, "error": "x", "cause": "Bad Luck"}),
    to("/worker/fail", "unknown-job", "id", "there is no job", {**REPORT, "error": "x"}, 404),
    to("/worker/fail", "result", "result", "no such field", {**REPORT, "error": "x", "result": 1}),
]

OPERATORS = [
    to("/work_queue/clear", "flag-text", "include_running", "boolean", {"include_running": "yes"}),
    to("/work_queue/clear", "flag-number", "include_running", "boolean", {"include_running": 1}),
    to("/work_queue/clear", "unknown", "include_runing", "did you mean 'include_running'", {"include_runing": True}),
    to("/work_queue/clear", "text", "(body)", "must be an object, not a string", "x", 400),
    to("/work_queue/purge_failed", "negative", "max_age_hours", "greater than", {"max_age_hours": -1}),
    to("/work_queue/purge_failed", "huge", "max_age_hours", "less than|number", {"max_age_hours": 10**400}),
    to("/work_queue/purge_failed", "bool", "max_age_hours", "not true or false", {"max_age_hours": False}),
    to("/work_queue/clear_inactive_workers", "text", "threshold_seconds", "number", {"threshold_seconds": "5m"}),
    to("/work_queue/clear_inactive_workers", "negative", "threshold_seconds", "greater", {"threshold_seconds": -5}),
    to("/work_queue/release_stuck", "null", "threshold_seconds", "number", {"threshold_seconds": None}),
    to("/work_queue/release_stuck", "unknown", "ids", "no such field", {"ids": ["x"]}),
    to("/work_queue/nothing", "path", None, UNKNOWN, {}, 404),
    to("/populator/populate", "force", "force", "boolean", {"force": "true"}),
    to("/populator/populate", "unknown", "forc", "did you mean 'force'", {"forc": True}),
    to("/daemons/x/restart", "unknown", "type", "there is no daemon 'x'; there are: .*job_reaper", {}, 404),
    to("/daemons/%00/stop", "nul", "type", "there is no daemon", {}, 404),
    to("/daemons/job_reaper/explode", "verb", None, UNKNOWN, {}, 404),
    to("/daemons/job_reaper/restart", "body", "when", "no such field", {"when": "now"}),
    to("/alerts", "nothing", "name", "is required", {}),
    to("/alerts", "name-lines", "name", "printable", {"name": "a\nb"}),
    to("/alerts", "name-long", "name", "at most 100", {"name": "x" * 101}),
    to("/alerts", "severity", "severity", "'info', 'warning' or 'critical'", {"name": "a", "severity": "bad"}),
    to("/alerts", "message", "message", "string", {"name": "a", "message": 1}),
    to("/alerts/clear", "nothing", "name", "is required", {}),
    to("/alerts/clear", "name", "name", "printable", {"name": "\u202e"}),
    to("/schedules", "nothing", "name", "is required", {}),
    to("/schedules", "self", "self", "no such field", {"name": "a", "cron": "* * * * *", "job": job(), "self": 1}),
    to(
        "/schedules",
        "zone",
        "timezone",
        "no time zone",
        {"name": "a", "cron": "* * * * *", "job": job(), "timezone": "\0"},
    ),
    to(
        "/schedules", "job", "job.commando", "no such field", {"name": "a", "cron": "* * * * *", "job": {"commando": 1}}
    ),
    to("/nodes/nobody/drain", "unknown", "id", "there is no node 'nobody'", {}, 404),
    to("/nodes/%00/undrain", "nul", "id", "there is no node", {}, 404),
    to("/nodes/n1/drain", "body", "until", "no such field", {"until": "noon"}),
    to("/nodes/n1/explode", "verb", None, UNKNOWN, {}, 404),
    to("/admin/shutdown", "body", "now", "no such field", {"now": True}),
]

TABLE = [*JOBS, *BATCHES, *BODIES, *HEADERS, *PATHS, *WORKERS, *OPERATORS]


def standing(node: NodeProcess) -> Any:
    """Everything about the queue that a refused request must leave alone."""
    status, told = node.request("GET", "/work_queue_status")
    assert status == 200
    return {name: told[name] for name in ("by_state", "by_kind", "totals", "alerts")}


def check_problem(status: int, headers: dict[str, str], told: Any) -> dict[str, Any]:
    assert headers["content-type"].startswith("application/problem+json"), (status, headers, told)
    assert isinstance(told, dict)
    assert {"type", "title", "status", "detail", "field"} <= set(told)
    assert told["status"] == status
    assert told["type"].startswith("urn:p2p:problem:")
    assert told["title"] and told["detail"], told
    assert "Traceback" not in json.dumps(told)
    return told


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len(TABLE) >= 130
    assert len({bad.id for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_a_malformed_request_is_told_what_is_wrong_and_changes_nothing(desk: NodeProcess, bad: Bad) -> None:
    before = standing(desk)
    status, headers, told = desk.exchange(bad.method, bad.path, bad.body, raw=bad.raw, headers=bad.headers)
    assert status == bad.status, told
    assert 400 <= status < 500
    problem = check_problem(status, headers, told)
    assert problem["field"] == bad.field, problem
    assert re.search(bad.says, problem["detail"]), problem
    assert standing(desk) == before
    assert "Traceback" not in desk.log_text


def test_a_repeated_idempotency_key_header_is_refused(desk: NodeProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", desk.port, timeout=10)
    connection.putrequest("POST", "/jobs")
    text = json.dumps(job()).encode()
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(text)))):
        connection.putheader(name, value)
    connection.putheader("Idempotency-Key", "one")
    connection.putheader("Idempotency-Key", "two")
    connection.endheaders(text)
    response = connection.getresponse()
    told = json.loads(response.read())
    connection.close()
    assert (response.status, told["field"]) == (422, "Idempotency-Key")


def test_a_template_param_that_is_missing_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    kinds = folder / "jobs.yaml"
    kinds.write_text('kinds: {greet: {command: [echo, "{who}", "{how}"], params: {how: softly}}}\n')
    node = NodeProcess(folder, ["--no-populate", "--no-worker", "--jobs-file", str(kinds)])
    try:
        node.start()
        for body, name in (({"kind": "greet"}, "params.who"), (batch({"kind": "greet"}), "jobs[0].params.who")):
            status, headers, told = node.exchange("POST", "/jobs", body)
            assert (status, check_problem(status, headers, told)["field"]) == (422, name)
            assert "needs it" in told["detail"]
        job_id = node.submit(kind="greet", params={"who": "you"})
        assert node.job(job_id)["command"] == ["echo", "you", "softly"]
    finally:
        node.destroy()


# -- what is not even HTTP -----------------------------------------------------------------------------------------

HOST = b"Host: 127.0.0.1\r\n"
JSON_HEAD = b"POST /jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

NOT_HTTP = {
    "empty-line": b"\r\n\r\n\r\n",
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
    "one-word": b"HELLO\r\n\r\n",
    "unheard-of-method": b"BREW /jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n",
    "no-version": b"GET /status\r\n" + HOST + b"\r\n",
    "version-9": b"GET /status HTTP/9.9\r\n" + HOST + b"\r\n",
    "version-words": b"GET /status HTTP/x.y\r\n" + HOST + b"\r\n",
    "preface-of-http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "method-with-braces": b"G{T /status HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-not-utf-8": b"GET /jobs/\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-empty": b"GET  HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-star": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-without-slash": b"GET status HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-of-a-proxy": b"GET http://[::bad/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "path-with-nul": b"GET /jobs/\x00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "connect": b"CONNECT example.org:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "long-path": b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
    "long-header": b"GET /status HTTP/1.1\r\n" + HOST + b"X-Long: " + b"x" * 20_000 + b"\r\n\r\n",
    "many-headers": b"GET /status HTTP/1.1\r\n" + HOST + b"".join(b"X-%d: 1\r\n" % n for n in range(2_000)) + b"\r\n",
    "header-without-colon": b"GET /status HTTP/1.1\r\n" + HOST + b"what is this\r\n\r\n",
    "header-without-name": b"GET /status HTTP/1.1\r\n" + HOST + b": x\r\n\r\n",
    "header-name-with-space": b"GET /status HTTP/1.1\r\n" + HOST + b"X Y: z\r\n\r\n",
    "header-with-nul": b"GET /status HTTP/1.1\r\n" + HOST + b"X-Y: a\x00b\r\n\r\n",
    "header-folded": b"GET /status HTTP/1.1\r\n" + HOST + b"X-Y: a\r\n b\r\n\r\n",
    "host-missing": b"GET /status HTTP/1.1\r\n\r\n",
    "host-missing-in-1.0": b"GET /status HTTP/1.0\r\n\r\n",
    "host-twice": b"GET /status HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "host-two-names": b"GET /status HTTP/1.1\r\nHost: 127.0.0.1, evil.example\r\n\r\n",
    "host-not-utf-8": b"GET /status HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    "length-negative": JSON_HEAD + b"Content-Length: -5\r\n\r\n{}",
    "length-words": JSON_HEAD + b"Content-Length: five\r\n\r\n{}",
    "length-huge": JSON_HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}",
    "length-twice": JSON_HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    "length-and-chunks": JSON_HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding-unknown": JSON_HEAD + b"Transfer-Encoding: gzipped\r\n\r\n{}",
    "chunk-without-length": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "chunk-negative": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "chunk-huge": CHUNKED + b"ffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "chunk-too-short": CHUNKED + b"2\r\n{}xx\r\n0\r\n\r\n",
    "chunk-not-json": CHUNKED + b"2\r\n{]\r\n0\r\n\r\n",
    "key-not-utf-8": JSON_HEAD + b"Content-Length: 2\r\nIdempotency-Key: \xff\xfe\r\n\r\n{}",
    "type-not-utf-8": b"POST /jobs HTTP/1.1\r\n" + HOST + b"Content-Type: \xff\r\nContent-Length: 2\r\n\r\n{}",
    "upgrade": b"GET /jobs?limit=x HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
}
# What breaks off: the sender closes its half in the middle.
BROKEN_OFF = {
    "half-a-request-line": b"GET /sta",
    "half-a-header": b"GET /status HTTP/1.1\r\nHost: 127.0",
    "half-a-body": JSON_HEAD + b'Content-Length: 100\r\n\r\n{"command": ["tr',
    "no-body": JSON_HEAD + b"Content-Length: 100\r\n\r\n",
    "half-a-chunk": CHUNKED + b'40\r\n{"command": ["tr',
    "chunks-without-end": CHUNKED + b"2\r\n{}\r\n",
    "half-a-claim": JSON_HEAD.replace(b"/jobs", b"/worker/claim") + b'Content-Length: 100\r\n\r\n{"worker": "w',
}


def converse(node: NodeProcess, sent: bytes, *, hang_up: bool = False) -> bytes:
    """Everything the node answers to these bytes until it closes or we do."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as connection:
        answer = b""
        try:
            connection.sendall(sent)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                answer += chunk
                head, end, rest = answer.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if end and length and len(rest) >= int(length[1]):
                    break
        except ConnectionError:
            pass  # closed with our bytes unread: a refusal too
        return answer


def check_refusal(answer: bytes) -> None:
    """4xx as a problem, or nothing at all."""
    assert b"Traceback" not in answer
    if answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/[01]\.\d 4\d\d ", head), answer[:300]
        assert b"application/problem+json" in head, answer[:300]
        assert json.loads(rest)["status"] == int(head.split()[1])


@pytest.mark.parametrize("sent", NOT_HTTP.values(), ids=NOT_HTTP.keys())
def test_broken_http_is_refused_and_the_node_lives_on(desk: NodeProcess, sent: bytes) -> None:
    before = standing(desk)
    check_refusal(converse(desk, sent, hang_up=sent == NOT_HTTP["empty-line"]))
    assert standing(desk) == before
    assert "Traceback" not in desk.log_text


@pytest.mark.parametrize("sent", BROKEN_OFF.values(), ids=BROKEN_OFF.keys())
def test_a_request_that_breaks_off_changes_nothing(desk: NodeProcess, sent: bytes) -> None:
    before = standing(desk)
    check_refusal(converse(desk, sent, hang_up=True))
    assert standing(desk) == before
    assert "Traceback" not in desk.log_text


def test_a_reset_in_the_middle_of_a_body_is_not_an_error_of_ours(desk: NodeProcess) -> None:
    for sent in BROKEN_OFF.values():
        connection = socket.create_connection(("127.0.0.1", desk.port), timeout=10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close() sends a reset
        connection.sendall(sent)
        connection.close()
    assert desk.request("GET", "/health") == (200, {"status": "ok"})
    assert "Traceback" not in desk.log_text


# -- fuzz ------------------------------------------------------------------------------------------------------------

SEED = 20260131
ROUNDS = 1_500
VALID: list[tuple[str, Any]] = [
    ("/jobs", job(priority=5, group="g", env={"A": "b"}, params={"x": 1}, requires={"cpus": 1, "labels": {"a": "b"}})),
    ("/jobs", batch(job(timeout_seconds=5, max_attempts=1), job(depends_on=["#0"], unique_key="k", not_before=1e9))),
    ("/jobs", {"kind": "selfplay", "params": {"game": "hex5", "seed": 5}}),
    ("/worker/claim", {"worker": "w", "resources": {"cpus": 2, "gpus": [{"uuid": "a"}]}, "max_jobs": 0}),
    ("/worker/heartbeat", {"worker": "w", "jobs": [{"id": "x", "attempt": 1, "progress": {"a": 1}}]}),
    ("/worker/complete", {"items": [{**REPORT, "result": {"a": 1}, "started_at": 5.0}]}),
    ("/worker/fail", {**REPORT, "error": "e", "exit_code": 1, "retryable": False, "cause": "exit"}),
    ("/work_queue/release_stuck", {"threshold_seconds": 3600}),
    ("/work_queue/purge_failed", {"max_age_hours": 5}),
    ("/alerts", {"name": "a", "message": "b", "severity": "info"}),
    ("/jobs/x/cancel", {"reason": "because"}),
]
POISON: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.5, -0.0, 1e308, 5e-324),
    *("", " ", "\0", "\ud800", "\udcff", "#0", "x" * 300, "é" * 70, "../..", "NaN", "1", "\u202e", "{seed}", "{", "%s"),
    *("\r\nX: y", [], {}, [[]], [{}], {"": ""}, {"a": {"b": []}}, ["\ud83d"], {"\ud800": 1}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`, its own first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in inside for found in places(inner, (*path, key)))]


def mutate(body: Any, dice: random.Random) -> Any:
    """The body with one to three places replaced, removed, renamed or doubled."""
    body = copy.deepcopy(body)
    for _ in range(dice.randint(1, 3)):
        path = dice.choice(places(body))
        if not path:
            continue
        holder = body
        for step in path[:-1]:
            holder = holder[step]
        poison = copy.deepcopy(dice.choice(POISON))
        match dice.randrange(4):
            case 0 | 1:
                holder[path[-1]] = poison
            case 2:
                del holder[path[-1]]
            case _ if isinstance(holder, dict):
                holder[str(dice.choice(["", "\ud800", path[-1] + "s", path[-1][:-1], "x" * 200]))] = poison
            case _:
                holder.append(poison)
    return body


def scramble(text: bytes, dice: random.Random) -> bytes:
    """The text with a few bytes changed, cut or doubled."""
    changed = bytearray(text)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed) or 1)
        match dice.randrange(3):
            case 0:
                changed[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del changed[at : at + dice.randint(1, 8)]
            case _:
                changed[at:at] = changed[at : at + 8]
    return bytes(changed)


def test_no_mutation_of_a_valid_request_gets_a_server_error(desk: NodeProcess) -> None:
    dice = random.Random(SEED)
    connection = http.client.HTTPConnection("127.0.0.1", desk.port, timeout=30)
    statuses: dict[int, int] = {}
    for n in range(ROUNDS):
        path, valid = dice.choice(VALID)
        body = mutate(valid, dice)
        as_msgpack = dice.random() < 0.3
        try:
            text = msgpack.packb(body) if as_msgpack else json.dumps(body).encode()
        except (OverflowError, ValueError):  # what msgpack cannot say
            as_msgpack, text = False, json.dumps(body).encode()
        if dice.random() < 0.25:
            text = scramble(text, dice)
        content_type = "application/msgpack" if as_msgpack else "application/json"
        connection.request("POST", path, body=text, headers={"Content-Type": content_type})
        response = connection.getresponse()
        told = response.read()
        where = f"seed {SEED}, round {n}: POST {path} {text[:300]!r} -> {response.status} {told[:300]!r}"
        assert response.status < 500, where
        statuses[response.status] = statuses.get(response.status, 0) + 1
        if response.status >= 400:
            headers = {name.lower(): value for name, value in response.getheaders()}
            check_problem(response.status, headers, json.loads(told))
    # What was let in must be fit to be told again, in both tongues.
    for content_type in ("application/json", "application/msgpack"):
        connection.request("GET", "/jobs?limit=1000", headers={"Content-Type": content_type})
        response = connection.getresponse()
        told = response.read()
        assert response.status == 200, told[:300]
        assert (json.loads if content_type == "application/json" else msgpack.unpackb)(told)["jobs"]
    connection.close()
    assert statuses[422] > ROUNDS / 3 and 400 in statuses and (200 in statuses or 201 in statuses), statuses
    assert "Traceback" not in desk.log_text
