-- The queue's tables. Only coordination/queue_state.py writes them, one journal entry at a time.
-- Times are unix milliseconds; `seq` is the order of submission and is never reused.
-- A change here is a new version (`queue_state.SCHEMA_VERSION`) and a step in migrations.sql; new columns go to the end.

CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;

-- Equal requirements are one shape: what a claim costs depends on shapes, not on jobs.
-- A shape that no job has any more (`jobs` = 0) goes when those jobs are pruned.
CREATE TABLE shapes (shape INTEGER PRIMARY KEY, requires TEXT NOT NULL UNIQUE, jobs INTEGER NOT NULL);

CREATE TABLE jobs (
    seq          INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    kind         TEXT NOT NULL,
    grp          TEXT NOT NULL,
    state        TEXT NOT NULL,
    priority     INTEGER NOT NULL,
    shape        INTEGER NOT NULL,
    attempt      INTEGER NOT NULL DEFAULT 0,   -- number of the newest attempt: the fence
    token        INTEGER NOT NULL DEFAULT 0,   -- journal index of the claim that began it (PROTOCOL §1)
    failures     INTEGER NOT NULL DEFAULT 0,   -- attempts spent
    max_attempts INTEGER NOT NULL,
    backoff_ms   INTEGER NOT NULL,
    timeout_ms   INTEGER NOT NULL,             -- running time of one attempt; 0 = none
    blockers     INTEGER NOT NULL DEFAULT 0,   -- unfinished dependencies
    ready_ms     INTEGER NOT NULL DEFAULT 0,   -- not before
    moves        INTEGER NOT NULL DEFAULT 0,   -- transitions so far: numbers the history
    created_ms   INTEGER NOT NULL,
    claimed_ms   INTEGER,
    started_ms   INTEGER,
    finished_ms  INTEGER,
    worker       TEXT,
    gpus         TEXT,                         -- JSON list of the GPU uuids granted to this attempt
    unique_key   TEXT,
    reason       TEXT,
    error        TEXT,
    exit_code    INTEGER,
    spec         BLOB NOT NULL,                -- JSON: command, env, cwd, params, … as resolved at submit
    result       BLOB,                         -- JSON
    no_retry     TEXT NOT NULL DEFAULT '',     -- exit codes that fail it at once: '2,64-78'
    asked        TEXT,                         -- what its author required, where `shape` has come to add hints to that
    failed_on    TEXT,                         -- JSON list of the last workers that an attempt failed on, oldest first
    checkpoint   BLOB                          -- JSON: what its newest attempt left to the one that follows
);

-- One partial index per question the queue is asked, so that a row pays only for the state it is in.
CREATE INDEX jobs_ready ON jobs (shape, priority DESC, seq) WHERE state = 'pending';
CREATE INDEX jobs_due ON jobs (ready_ms, seq) WHERE state = 'waiting' AND blockers = 0;
CREATE INDEX jobs_held ON jobs (worker, seq) WHERE state IN ('claimed', 'running');
CREATE INDEX jobs_done ON jobs (state, finished_ms, seq) WHERE state IN ('completed', 'failed', 'cancelled');
CREATE UNIQUE INDEX jobs_unique ON jobs (unique_key)
    WHERE unique_key IS NOT NULL AND state IN ('waiting', 'pending', 'claimed', 'running');
CREATE INDEX jobs_by_state ON jobs (state, seq);

-- Job arrays. Members are jobs, numbered from seq + 1 on and made a window at a time from `template` (coordination/arrays).
CREATE TABLE arrays (
    seq         INTEGER PRIMARY KEY,
    id          TEXT NOT NULL UNIQUE,
    size        INTEGER NOT NULL,
    indexes     TEXT NOT NULL,                 -- '1-1000:10%5'
    kind        TEXT NOT NULL,
    grp         TEXT NOT NULL,
    unique_key  TEXT,
    created_ms  INTEGER NOT NULL,
    template    BLOB NOT NULL,                 -- what its members are made of (commands.NewJob)
    state       TEXT NOT NULL DEFAULT '',      -- how it ended; empty until then
    reason      TEXT,
    finished_ms INTEGER,
    blockers    INTEGER NOT NULL DEFAULT 0,    -- unfinished dependencies
    closed      INTEGER NOT NULL DEFAULT 0,    -- 1: no more members are made; 2: those there are are being cancelled
    made        INTEGER NOT NULL DEFAULT 0,    -- members that have come to be
    parked      INTEGER NOT NULL DEFAULT 0,    -- members that wait for their turn: in deps under -seq
    pruned      INTEGER NOT NULL DEFAULT 0,    -- members that are forgotten; they still count below
    waiting INTEGER NOT NULL DEFAULT 0, pending INTEGER NOT NULL DEFAULT 0, claimed INTEGER NOT NULL DEFAULT 0,
    running INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX arrays_unfinished ON arrays (seq) WHERE finished_ms IS NULL;
CREATE INDEX arrays_empty ON arrays (finished_ms, seq) WHERE finished_ms IS NOT NULL AND made = pruned;
CREATE INDEX arrays_unique ON arrays (unique_key) WHERE unique_key IS NOT NULL AND finished_ms IS NULL;

-- Recurring jobs (coordination/schedules). `due_ms` is the next time, 0 = never.
CREATE TABLE schedules (
    name        TEXT PRIMARY KEY,
    body        TEXT NOT NULL,                 -- JSON, as its author wrote it
    origin      TEXT NOT NULL,                 -- 'file' (jobs.yaml) or 'api'
    due_ms      INTEGER NOT NULL,
    changed_ms  INTEGER NOT NULL,
    runs        INTEGER NOT NULL DEFAULT 0,    -- jobs it has made
    skipped     INTEGER NOT NULL DEFAULT 0,    -- due times that made none
    last_due_ms INTEGER,
    last_job    TEXT,
    note        TEXT NOT NULL DEFAULT ''       -- why its newest due time made no job
) WITHOUT ROWID;
CREATE INDEX schedules_due ON schedules (due_ms, name) WHERE due_ms > 0;

CREATE TABLE history (
    seq INTEGER NOT NULL, n INTEGER NOT NULL, at_ms INTEGER NOT NULL, state TEXT NOT NULL,
    attempt INTEGER NOT NULL, worker TEXT, reason TEXT,
    PRIMARY KEY (seq, n)
) WITHOUT ROWID;

-- dependency -> dependent, for what a finish unblocks; the spec keeps the list the author gave.
CREATE TABLE deps (dep INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (dep, seq)) WITHOUT ROWID;
CREATE INDEX deps_of ON deps (seq);

-- The members of a gang's newest attempt, by rank. A job of one node has none: its worker stands in its row.
CREATE TABLE members (
    seq INTEGER NOT NULL, rank INTEGER NOT NULL, attempt INTEGER NOT NULL, worker TEXT NOT NULL, gpus TEXT,
    state TEXT NOT NULL, started_ms INTEGER, result BLOB,
    PRIMARY KEY (seq, rank)
) WITHOUT ROWID;
CREATE INDEX members_of ON members (worker, seq) WHERE state <> 'ended';

-- What operators, or the leader itself, have said of nodes. A node of which nothing is said has no row.
CREATE TABLE nodes (
    node TEXT PRIMARY KEY, cordoned INTEGER NOT NULL, draining INTEGER NOT NULL, deadline_ms INTEGER NOT NULL,
    since_ms INTEGER NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID;

-- Idempotency keys and the answer each one got; kept a day.
CREATE TABLE keys (key TEXT PRIMARY KEY, at_ms INTEGER NOT NULL, digest TEXT NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX keys_age ON keys (at_ms);

-- Sums kept as the queue moves, so that a status page never counts rows.
CREATE TABLE counts (state TEXT NOT NULL, kind TEXT NOT NULL, grp TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (state, kind, grp)) WITHOUT ROWID;
CREATE TABLE shape_counts (shape INTEGER PRIMARY KEY, n INTEGER NOT NULL);
CREATE TABLE minutes (minute INTEGER NOT NULL, kind TEXT NOT NULL, what TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (minute, kind, what)) WITHOUT ROWID;
CREATE TABLE totals (kind TEXT NOT NULL, what TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (kind, what)) WITHOUT ROWID;
CREATE TABLE workers (worker TEXT PRIMARY KEY, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    claimed INTEGER NOT NULL DEFAULT 0, seen_ms INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
