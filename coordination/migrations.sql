-- From each version of schema.sql to the next: `-- to: N` begins the step that leads to version N.
-- A step says what differs and gives new columns their defaults; it is applied once, in one transaction, at the opening.

-- to: 2
ALTER TABLE jobs ADD COLUMN no_retry TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN asked TEXT;
ALTER TABLE jobs ADD COLUMN failed_on TEXT;
ALTER TABLE jobs ADD COLUMN checkpoint BLOB;
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
