-- What sandboxes can be made from, beside what is built in.
CREATE TABLE templates (
    id          TEXT PRIMARY KEY,
    org_id      TEXT NOT NULL REFERENCES organizations (id),
    document    TEXT NOT NULL,             -- JSON
    created_at  INTEGER NOT NULL,
    updated_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX templates_of_org ON templates (org_id, created_at);
