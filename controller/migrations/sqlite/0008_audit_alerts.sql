-- Records that somebody should look at: see controller/src/alerts.rs.
ALTER TABLE egress_audit ADD COLUMN alert TEXT;
CREATE INDEX egress_audit_of_alerts ON egress_audit (org_id, sequence) WHERE alert IS NOT NULL;
