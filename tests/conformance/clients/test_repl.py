"""Sessions that keep their state."""

import threading

from support import WithSandbox, since


@since(2, 1)
class Repl(WithSandbox):
    def test_state_is_kept_between_pieces_of_code(self):
        from stateset_sandbox.repl import ReplSession

        with ReplSession.create(self.client, self.id) as repl:
            self.assertEqual(repl.execute("x = 41").error, "")
            self.assertEqual(repl.execute("print(x + 1)").output, "42\n")
            failed = repl.execute("1 / 0")
            self.assertIn("ZeroDivisionError", failed.error)
            after = repl.execute("print('on')")
            self.assertEqual((after.output, after.error), ("on\n", ""))
            self.assertGreaterEqual(after.execution_count, 4)

    def test_what_runs_is_interrupted(self):
        from stateset_sandbox.repl import ReplSession

        with ReplSession.create(self.client, self.id) as repl:
            repl.execute("import os, time")
            heard = []
            code = "open('/workspace/begun', 'w').close()\nwhile True: time.sleep(0.05)"
            thread = threading.Thread(target=lambda: heard.append(repl.execute(code, 25000)))
            thread.start()
            self.shell(self.id, "for n in $(seq 200); do [ -e /workspace/begun ] && exit 0; sleep 0.1; done; exit 1")
            self.assertTrue(repl.interrupt())
            thread.join(30)
            self.assertIn("KeyboardInterrupt", heard[0].error)
            self.assertEqual(repl.execute("print(1)").output, "1\n")

    def test_by_the_clients_methods_and_in_another_language(self):
        made = self.client.create_repl_session(self.id, "node")
        session = made["session_id"]
        self.assertEqual(made["language"], "node")
        self.assertEqual(self.client.execute_repl(self.id, session, "var y = 20")["error"], "")
        self.assertIn("42", self.client.execute_repl(self.id, session, "console.log(y + 22)")["output"])
        self.assertIs(self.client.destroy_repl_session(self.id, session), True)
        with self.refused(404):
            self.client.execute_repl(self.id, session, "1")
        with self.refused(400):
            self.client.create_repl_session(self.id, "no-such-language")
