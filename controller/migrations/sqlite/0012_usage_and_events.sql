-- What sandboxes have used, by the hour (hours since the epoch). A record outlives its sandbox.
CREATE TABLE usage (
    sandbox_id          TEXT NOT NULL,
    hour                INTEGER NOT NULL,
    org_id              TEXT NOT NULL,
    cpu_micros          INTEGER NOT NULL DEFAULT 0,
    memory_kib_seconds  INTEGER NOT NULL DEFAULT 0,
    network_bytes       INTEGER NOT NULL DEFAULT 0,
    creations           INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (sandbox_id, hour)
) STRICT;
CREATE INDEX usage_of_org ON usage (org_id, hour);
CREATE INDEX usage_by_hour ON usage (hour);

-- What happened to sandboxes, for those who follow it. Only the newest are kept.
CREATE TABLE events (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    org_id      TEXT NOT NULL,
    sandbox_id  TEXT NOT NULL,
    kind        TEXT NOT NULL,
    time        INTEGER NOT NULL,
    document    TEXT NOT NULL              -- JSON: what else there is to say
) STRICT;
CREATE INDEX events_of_org ON events (org_id, sequence);
