-- Whose a tunnel was that is gone: its owner may ask again whether it is cut.
ALTER TABLE tunnel_removals ADD COLUMN org_id TEXT;
ALTER TABLE tunnel_removals ADD COLUMN sandbox_id TEXT;
