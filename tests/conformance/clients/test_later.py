"""What later versions of the server will answer: today a 404 in the envelope, so that no client waits or tries again."""

from stateset_sandbox import types

from support import CALLED, Recorded, WithSandbox, methods

# The method, and arguments that the client lets through.
LATER = {
    "list_checkpoints": (),
    "get_checkpoint": ("cp_1",),
    "create_checkpoint": ("$id", "CreateCheckpointOptions:name"),
    "restore_checkpoint": ("$id", "cp_1"),
    "clone_checkpoint": ("cp_1", "copy"),
    "delete_checkpoint": ("cp_1",),
    "compare_checkpoints": ("cp_1", "cp_2"),
    "list_artifacts": (),
    "get_artifact": ("art_1",),
    "get_artifact_url": ("art_1",),
    "upload_artifact": ("$id", "UploadArtifactOptions:path"),
    "download_artifact": ("$id", "art_1", "/workspace/x"),
    "delete_artifact": ("art_1",),
    "list_webhooks": (),
    "create_webhook": ("CreateWebhookOptions:url",),
    "delete_webhook": ("wh_1",),
    "test_webhook": ("wh_1",),
    "get_webhook_deliveries": ("wh_1",),
    "create_agent_session": (),
    "get_agent_session": ("s",),
    "list_agent_sessions": (),
    "start_agent_session": ("s",),
    "pause_agent_session": ("s",),
    "resume_agent_session": ("s",),
    "stop_agent_session": ("s",),
    "cancel_agent_session": ("s",),
    "delete_agent_session": ("s",),
    "execute_in_agent_session": ("s", "AgentExecuteOptions:command"),
    "get_agent_session_events": ("s",),
    "get_agent_session_events_response": ("s",),
    "update_agent_context": ("s", {}),
    "agent_session_heartbeat": ("s",),
    "reattach_agent_session": ("c",),
    "reattach_agent_session_response": ("c",),
    "register_agent_tool": ("s", "RegisterToolOptions:name"),
    "list_agent_tools": ("s",),
    "read_agent_session_file": ("s", "/x"),
    "read_agent_session_file_raw": ("s", "/x"),
    "write_agent_session_file": ("s", "/x", "y"),
    "write_agent_session_files": ("s", []),
    "list_agent_session_files": ("s",),
    "list_agent_session_files_response": ("s",),
    "start_mcp_server": ("$id", "n", "c"),
    "stop_mcp_server": ("$id", "n"),
    "list_mcp_servers": ("$id",),
    "get_mcp_presets": (),
    "fork": ("$id",),
    "promote": ("$id", "container"),
    "inference": ("$id", "InferenceOptions:path"),
    "screenshot": ("$id",),
    "mouse": ("$id", "click", 1, 1),
    "keyboard": ("$id", "type", "x"),
    "get_screen_size": ("$id",),
    "get_queue_health": (),
    "run_benchmark": (),
    "get_benchmark_history": (),
    "get_benchmark_summary": (),
}

class Later(WithSandbox):
    def argument(self, text):
        if text == "$id":
            return self.id
        if isinstance(text, str) and ":" in text:
            model, field = text.split(":")
            more = {"provider": "openai", "body": {}} if model == "InferenceOptions" else {}
            return getattr(types, model)(**{field: "https://x.test"}, **more)
        return text

    def test_it_is_a_404_of_the_api(self):
        # Some of them call others.
        before = set(CALLED)
        for name in sorted(LATER.keys() & methods()):
            published = getattr(super(Recorded, self.client), name)
            with self.subTest(name), self.refused(404, "NOT_FOUND"):
                published(*(self.argument(one) for one in LATER[name]))
        CALLED.intersection_update(before)

