"""What can be seen: usage, metrics, pool, audit, events; and the network's settings."""

import datetime
import threading

from support import Case, WithSandbox, client, registered, since


class Usage(WithSandbox):
    def test_the_present_period(self):
        usage = self.client.get_current_usage()
        self.assertLess(usage.period_start, usage.period_end)
        self.assertGreaterEqual(usage.sandbox_creations, 1)
        self.assertGreaterEqual(usage.cpu_hours, 0)

    def test_history(self):
        today = datetime.datetime.now(datetime.timezone.utc)
        start = (today - datetime.timedelta(days=2)).strftime("%Y-%m-%dT00:00:00Z")
        history = self.client.get_usage_history("daily", start, today.strftime("%Y-%m-%dT%H:%M:%SZ"))
        self.assertEqual(history.granularity, "daily")
        self.assertGreaterEqual(sum(one.sandbox_creations for one in history.data), 1)
        self.assertEqual(self.client.get_usage_history().granularity, "daily")

    @since(1, 1)
    def test_by_sandbox(self):
        self.assertIn(self.id, str(self.client.get_usage_by_sandbox()))


@since(1, 1)
class Metrics(WithSandbox):
    def test_now_and_before(self):
        self.shell(self.id, "timeout 1 sh -c 'while :; do :; done' || true")
        now = self.client.get_metrics(self.id)
        self.assertGreater(now.memory.usage, 0)
        self.assertGreater(now.memory.limit, now.memory.usage)
        self.assertGreaterEqual(now.cpu.limit, now.cpu.usage)
        self.assertIsInstance(self.client.get_metrics_history(self.id, limit=5), list)
        summary = self.client.get_metrics_summary(self.id)
        if summary is not None:
            self.assertGreaterEqual(summary.duration, 0)

    def test_the_pool(self):
        stats = self.client.get_pool_stats()
        self.assertGreaterEqual(stats.total, stats.ready)


class Audit(WithSandbox):
    def test_what_was_done_is_written_down(self):
        self.client.execute(self.id, ["echo", "not to be written down"])
        self.client.write_file(self.id, "/workspace/f", "content")
        self.client.read_file(self.id, "/workspace/f")
        audit = self.client.list_audit_events(sandbox_id=self.id, limit=50)
        actions = [event.action for event in audit["events"]]
        for action in ["sandbox.create", "command.execute", "file.write", "file.read"]:
            self.assertIn(action, actions)
        self.assertGreaterEqual(audit["total"], 4)
        self.assertTrue(all(event.sandbox_id == self.id for event in audit["events"]))
        only = self.client.list_audit_events(
            sandbox_id=self.id, action="file.write", outcome="success", limit=1
        )
        self.assertEqual([event.action for event in only["events"]], ["file.write"])
        summary = self.client.get_sandbox_audit_summary(self.id)
        self.assertGreaterEqual(summary.commands_executed, 1)
        self.assertGreaterEqual(summary.files_written, 1)
        self.assertGreaterEqual(summary.files_read, 1)

    def test_it_is_the_organisations_own(self):
        with client(registered().api_key.key) as other:
            self.assertEqual(other.list_audit_events(sandbox_id=self.id)["events"], [])
            with self.refused(404, "SANDBOX_NOT_FOUND"):
                other.get_sandbox_audit_summary(self.id)


@since(2, 1)
class Events(Case):
    def test_they_come_and_come_again(self):
        seen, enough = [], threading.Event()

        def whole():
            """A sandbox of which the beginning and the end were heard."""
            began = {e.data["sandbox_id"]: e for e in seen if e.event == "sandbox.created"}
            ended = [e.data["sandbox_id"] for e in seen if e.event == "sandbox.stopped"]
            return next((began[one] for one in ended if one in began), None)

        def listen():
            with client(timeout=60000) as own:
                for event in own.stream_events():
                    seen.append(event)
                    if whole():
                        enough.set()
                        return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        # Whether the listener is there yet is seen by what it hears.
        for _ in range(20):
            self.client.stop(self.client.create().sandbox_id)
            if enough.wait(3):
                break
        thread.join(30)
        created = whole()
        self.assertIsNotNone(created, seen)
        # From there on, once more.
        again = self.client.stream_events(last_event_id=created.id)
        for event in again:
            self.assertGreater(int(event.id), int(created.id))
            if event.event == "sandbox.stopped" and event.data["sandbox_id"] == created.data["sandbox_id"]:
                break
        again.close()

    def test_a_token_that_is_none(self):
        with self.refused(401):
            client("no.such.token").stream_events()


@since(2, 1)
class Network(WithSandbox):
    def test_the_organisations_policy(self):
        with client(registered().api_key.key) as own:
            stored = own.set_egress_policy(
                "allowlist", allowed_domains=["ok.test"], allowed_ports=[443]
            )
            self.assertEqual((stored["mode"], stored["allowed_domains"]), ("allowlist", ["ok.test"]))
            self.assertEqual(own.get_egress_policy()["allowed_ports"], [443])
            with self.refused(400, "VALIDATION_ERROR"):
                own.set_egress_policy("open sesame")
            self.assertEqual(own.get_egress_policy()["mode"], "allowlist")

    def test_what_went_out_is_written_down(self):
        self.client.execute(self.id, "curl -s -m 2 http://10.0.0.5/ || true")
        for _ in range(100):
            events = self.client.query_egress_audit(sandbox_id=self.id, decision="deny", limit=5)
            if events:
                break
            threading.Event().wait(0.1)
        self.assertTrue(events)
        self.assertEqual(self.client.query_egress_audit(host="no.such.host.test"), [])
