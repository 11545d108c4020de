-- What a tier in audit mode denies and lets through has a verdict of its own.
CREATE TABLE egress_audit_with_mode (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    id          TEXT NOT NULL UNIQUE,
    org_id      TEXT NOT NULL,
    sandbox_id  TEXT NOT NULL,
    time        INTEGER NOT NULL,
    verdict     TEXT NOT NULL CHECK (verdict IN ('allow', 'deny', 'audit')),
    host        TEXT,
    document    TEXT NOT NULL
) STRICT;
INSERT INTO egress_audit_with_mode SELECT sequence, id, org_id, sandbox_id, time, verdict, host, document FROM egress_audit;
DROP TABLE egress_audit;
ALTER TABLE egress_audit_with_mode RENAME TO egress_audit;
CREATE INDEX egress_audit_of_org ON egress_audit (org_id, sequence);
CREATE INDEX egress_audit_of_sandbox ON egress_audit (sandbox_id, sequence);
