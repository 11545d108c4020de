-- Tunnels: on the tunnel feed while they are here. One that is closed is deleted at once, one that has expired
-- an hour later, so that its URL can say so meanwhile. Of a token there is only the digest.

CREATE TABLE tunnels (
    sequence       INTEGER PRIMARY KEY AUTOINCREMENT,
    id             TEXT NOT NULL UNIQUE,
    org_id         TEXT NOT NULL REFERENCES organizations (id),
    sandbox_id     TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    port           INTEGER NOT NULL,
    protocol       TEXT NOT NULL,
    token_hash     BLOB,                        -- SHA-256 of the token's text; NULL: public
    local_port     INTEGER,                     -- what tunnel-proxy listens on for it
    feed_revision  INTEGER NOT NULL,
    created_at     INTEGER NOT NULL,
    expires_at     INTEGER NOT NULL,
    retired        INTEGER NOT NULL DEFAULT 0   -- 1: expired, and its port is no longer on the node's feed
) STRICT;
CREATE INDEX tunnels_of_sandbox ON tunnels (sandbox_id, sequence);
CREATE INDEX tunnels_by_revision ON tunnels (feed_revision);
CREATE INDEX tunnels_by_expiry ON tunnels (expires_at);

-- Revisions and the horizon are those of `feed`.
CREATE TABLE tunnel_removals (
    tunnel_id  TEXT PRIMARY KEY,
    revision   INTEGER NOT NULL
) STRICT;
CREATE INDEX tunnel_removals_by_revision ON tunnel_removals (revision);
