-- Secrets of organisations. A value is sealed (AES-256-GCM, see `vault.rs`); the key that opens it is not here.

CREATE TABLE secrets (
    id                  TEXT PRIMARY KEY,
    org_id              TEXT NOT NULL REFERENCES organizations (id),
    name                TEXT NOT NULL,
    scope               TEXT NOT NULL,
    egress              TEXT,              -- JSON list of bindings; NULL: a plain environment variable
    placeholder_prefix  TEXT NOT NULL,     -- what placeholders begin with
    version             INTEGER NOT NULL,  -- feed revision of the last change
    key_id              BLOB NOT NULL,     -- which key-encryption key
    wrapped_key         BLOB NOT NULL,
    ciphertext          BLOB NOT NULL,
    created_at          INTEGER NOT NULL,
    updated_at          INTEGER NOT NULL,
    UNIQUE (org_id, name)
) STRICT;

-- Which sandbox has which secret, and what stands there in its place. Several rows of one secret when a
-- sandbox inherited from several others; the last one is shown to new commands, all of them work.
CREATE TABLE sandbox_secrets (
    sequence     INTEGER PRIMARY KEY AUTOINCREMENT,
    sandbox_id   TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    secret_id    TEXT NOT NULL REFERENCES secrets (id) ON DELETE CASCADE,
    placeholder  TEXT NOT NULL,
    UNIQUE (sandbox_id, placeholder)
) STRICT;
CREATE INDEX sandbox_secrets_of_secret ON sandbox_secrets (secret_id, sandbox_id);

-- 0: from before sandboxes had a certificate authority.
ALTER TABLE sandboxes ADD COLUMN ca_generation INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN ca_certificate TEXT;
