-- Each record is bound to the one before it of the same organisation: see controller/src/chain.rs. Records from before
-- have none of it, and cannot be verified.
ALTER TABLE egress_audit ADD COLUMN epoch INTEGER;
ALTER TABLE egress_audit ADD COLUMN position INTEGER;
ALTER TABLE egress_audit ADD COLUMN mac BLOB;
CREATE INDEX egress_audit_of_chain ON egress_audit (org_id, epoch, position);

-- Where each chain begins (after the last record that was forgotten, sealed) and where it ends.
CREATE TABLE egress_audit_chains (
    org_id           TEXT PRIMARY KEY,
    epoch            INTEGER NOT NULL,
    key_id           BLOB NOT NULL,
    anchor_sequence  INTEGER NOT NULL,
    anchor_position  INTEGER NOT NULL,
    anchor_mac       BLOB NOT NULL,
    anchor_seal      BLOB NOT NULL,
    position         INTEGER NOT NULL,
    mac              BLOB NOT NULL
) STRICT;
