-- A key is a user's, whose role bounds it. Until now every organisation had one user, its owner.
ALTER TABLE api_keys ADD COLUMN user_id TEXT REFERENCES users (id);
UPDATE api_keys SET user_id = (SELECT min(users.id) FROM users WHERE users.org_id = api_keys.org_id);
CREATE INDEX api_keys_of_user ON api_keys (user_id);
CREATE INDEX users_of_org ON users (org_id, created_at);

-- Each is used once, and then it is gone.
CREATE TABLE invitations (
    id          TEXT PRIMARY KEY,
    org_id      TEXT REFERENCES organizations (id),   -- NULL: the operator's, to make an organisation with
    email       TEXT,                                 -- who may use it; NULL: whoever has it
    role        TEXT NOT NULL,
    hash        BLOB NOT NULL,                        -- SHA-256 of the whole token
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX invitations_of_org ON invitations (org_id, created_at);
