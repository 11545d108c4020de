-- Sandboxes that were made before anybody asked for them. They are nobody's: no query of a tenant's reads this
-- table. A claim moves the row to `sandboxes` in one transaction.

CREATE TABLE pool (
    id              TEXT PRIMARY KEY,
    status          TEXT NOT NULL CHECK (status IN ('creating', 'ready', 'ending')),
    spec            TEXT NOT NULL,             -- JSON: what it was made with
    build           TEXT NOT NULL,             -- what it was made from; another one is out of date
    endpoint        TEXT,                      -- JSON: set while it is on the feed
    feed_revision   INTEGER NOT NULL DEFAULT 0,
    created_at      INTEGER NOT NULL,
    ca_generation   INTEGER NOT NULL,
    ca_certificate  TEXT NOT NULL
) STRICT;
CREATE INDEX pool_on_feed ON pool (feed_revision) WHERE endpoint IS NOT NULL;
