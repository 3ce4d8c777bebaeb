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
