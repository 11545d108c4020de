-- Times are milliseconds since the epoch. Documents are JSON.

CREATE TABLE organizations (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    slug        TEXT NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE users (
    id          TEXT PRIMARY KEY,
    org_id      TEXT NOT NULL REFERENCES organizations (id),
    email       TEXT NOT NULL UNIQUE,          -- lower case
    role        TEXT NOT NULL,
    first_name  TEXT,
    last_name   TEXT,
    use_case    TEXT,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE api_keys (
    id            TEXT PRIMARY KEY,
    org_id        TEXT NOT NULL REFERENCES organizations (id),
    name          TEXT NOT NULL,
    prefix        TEXT NOT NULL,
    hash          BLOB NOT NULL,               -- SHA-256 of the whole key
    scopes        TEXT NOT NULL,               -- JSON list
    created_at    INTEGER NOT NULL,
    expires_at    INTEGER,
    last_used_at  INTEGER,
    revoked_at    INTEGER
) STRICT;
CREATE INDEX api_keys_of_org ON api_keys (org_id, created_at);

CREATE TABLE sandboxes (
    sequence         INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT NOT NULL UNIQUE,
    org_id           TEXT NOT NULL REFERENCES organizations (id),
    session_id       TEXT NOT NULL,
    status           TEXT NOT NULL CHECK (status IN ('creating', 'running', 'terminating', 'terminated', 'error')),
    status_reason    TEXT,
    spec             TEXT NOT NULL,            -- JSON: what was asked for
    endpoint         TEXT,                     -- JSON: set while the sandbox is on the feed
    feed_revision    INTEGER NOT NULL DEFAULT 0,
    created_at       INTEGER NOT NULL,
    expires_at       INTEGER NOT NULL,
    ended_at         INTEGER,
    deleted_at       INTEGER                   -- no longer shown to anybody
) STRICT;
CREATE INDEX sandboxes_of_org ON sandboxes (org_id, sequence);
CREATE INDEX sandboxes_live ON sandboxes (status) WHERE status IN ('creating', 'running', 'terminating');
CREATE INDEX sandboxes_on_feed ON sandboxes (feed_revision) WHERE endpoint IS NOT NULL;
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE organization_policies (
    org_id      TEXT PRIMARY KEY REFERENCES organizations (id),
    document    TEXT NOT NULL,
    revision    INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE sandbox_policies (
    sandbox_id  TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
    document    TEXT NOT NULL,
    revision    INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL
) STRICT;

-- The feed's position. `horizon`: removals before it are forgotten, so an older `since` gets a snapshot.
CREATE TABLE feed (
    one       INTEGER PRIMARY KEY CHECK (one = 1),
    revision  INTEGER NOT NULL,
    horizon   INTEGER NOT NULL
) STRICT;

CREATE TABLE feed_removals (
    sandbox_id  TEXT PRIMARY KEY,
    revision    INTEGER NOT NULL
) STRICT;
CREATE INDEX feed_removals_by_revision ON feed_removals (revision);

-- No foreign keys: a record outlives what it is about.
CREATE TABLE egress_audit (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    org_id      TEXT NOT NULL,
    sandbox_id  TEXT NOT NULL,
    time        INTEGER NOT NULL,
    verdict     TEXT NOT NULL CHECK (verdict IN ('allow', 'deny')),
    host        TEXT,
    document    TEXT NOT NULL
) STRICT;
CREATE INDEX egress_audit_of_org ON egress_audit (org_id, sequence);
CREATE INDEX egress_audit_of_sandbox ON egress_audit (sandbox_id, sequence);
