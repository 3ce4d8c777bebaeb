-- From each version of schema.sql to the next: `-- to: N` begins the step that leads to version N.
-- A step says what differs and gives new columns their defaults; it is applied once, in one transaction, at the opening.

-- to: 2
ALTER TABLE jobs ADD COLUMN no_retry TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN asked TEXT;
ALTER TABLE jobs ADD COLUMN failed_on TEXT;
ALTER TABLE jobs ADD COLUMN checkpoint BLOB;
