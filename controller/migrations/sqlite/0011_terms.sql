-- What a sandbox's owner asks for beside resources. `paused`: its processes are to be frozen.
ALTER TABLE sandboxes ADD COLUMN session_key TEXT;
ALTER TABLE sandboxes ADD COLUMN idle_timeout_seconds INTEGER;
ALTER TABLE sandboxes ADD COLUMN metadata TEXT;                  -- JSON: texts by name
ALTER TABLE sandboxes ADD COLUMN template_id TEXT;
ALTER TABLE sandboxes ADD COLUMN paused INTEGER NOT NULL DEFAULT 0;

-- Of one session there is one sandbox at a time.
CREATE UNIQUE INDEX sandboxes_of_session ON sandboxes (org_id, session_key)
    WHERE session_key IS NOT NULL AND status IN ('creating', 'running');
