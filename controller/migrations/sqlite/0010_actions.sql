-- Who did what by the API: see controller/src/service/actions.rs. No foreign keys: a record outlives what it is about.
CREATE TABLE actions (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    org_id      TEXT NOT NULL,
    user_id     TEXT,
    sandbox_id  TEXT NOT NULL,             -- '': about none
    session_id  TEXT NOT NULL,             -- the sandbox's
    time        INTEGER NOT NULL,
    action      TEXT NOT NULL,
    outcome     TEXT NOT NULL CHECK (outcome IN ('success', 'failure', 'denied', 'cancelled')),
    duration    INTEGER NOT NULL,          -- milliseconds
    document    TEXT NOT NULL              -- JSON: the rest
) STRICT;
CREATE INDEX actions_of_org ON actions (org_id, sequence);
CREATE INDEX actions_of_sandbox ON actions (org_id, sandbox_id, sequence);
CREATE INDEX actions_by_time ON actions (time);
