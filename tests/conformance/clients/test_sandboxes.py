"""Life of a sandbox."""

import datetime

from stateset_sandbox import types

from support import Case, WithSandbox, client, registered, since


class Life(Case):
    def test_create_get_list_stop_and_delete(self):
        made = self.client.create(
            types.CreateSandboxOptions(
                cpus="1", memory="512Mi", timeout_seconds=300, env={"GREETING": "hello"}
            )
        )
        self.assertEqual(made.status, "running")
        self.assertEqual((made.cpus, made.memory), ("1", "512Mi"))
        life = made.expires_at - made.created_at
        self.assertAlmostEqual(life / datetime.timedelta(seconds=1), 300, delta=5)
        self.assertEqual(self.shell(made.sandbox_id, "printenv GREETING"), "hello\n")
        self.assertEqual(self.client.get(made.sandbox_id).session_id, made.session_id)
        self.assertIn(made.sandbox_id, [one.sandbox_id for one in self.client.list()])
        self.assertIs(self.client.stop(made.sandbox_id), True)
        # Context managers of the client stop twice.
        self.assertIs(self.client.stop(made.sandbox_id), True)
        self.assertEqual(self.client.get(made.sandbox_id).status, "terminated")
        self.assertIs(self.client.delete(made.sandbox_id), True)
        with self.refused(404, "SANDBOX_NOT_FOUND"):
            self.client.get(made.sandbox_id)

    def test_without_any_option(self):
        made = self.client.create()
        self.assertEqual(made.status, "running")
        self.assertIs(self.client.delete(made.sandbox_id), True)

    def test_what_is_not_there(self):
        for call in [self.client.get, self.client.stop, self.client.delete]:
            with self.refused(404, "SANDBOX_NOT_FOUND"):
                call("sandbox-00000000")
        with self.refused(404, "SANDBOX_NOT_FOUND"):
            self.client.execute("sandbox-00000000", "true")

    def test_options_that_cannot_be(self):
        for options, field in [
            ({"cpus": "many"}, "cpus"),
            ({"memory": "-1"}, "memory"),
            ({"timeout_seconds": 1}, "timeout_seconds"),
            ({"env": {"a=b": "c"}}, "env"),
            ({"template": "no-such-template"}, "template"),
        ]:
            with self.subTest(options), self.refused(400, "VALIDATION_ERROR") as refusal:
                self.client.create(types.CreateSandboxOptions(**options))
            with self.subTest(options):
                self.assertIn(field, str(refusal.error))

    @since(2, 1)
    def test_an_isolation_that_is_not_here_is_refused_not_weakened(self):
        for isolation in ["microvm", "gvisor"]:
            with self.refused(400) as refusal:
                self.client.create(types.CreateSandboxOptions(isolation=isolation))
            self.assertIn("isolation", str(refusal.error))

    def test_others_are_strangers(self):
        made = self.client.create()
        try:
            with client(registered().api_key.key) as other:
                self.assertEqual(other.list(), [])
                for call in [other.get, other.stop, other.delete]:
                    with self.refused(404, "SANDBOX_NOT_FOUND"):
                        call(made.sandbox_id)
        finally:
            self.client.stop(made.sandbox_id)


@since(2, 1)
class Lifetime(WithSandbox):
    def test_extend_moves_the_end(self):
        before = self.client.get_status(self.id)
        longer = self.client.extend(self.id, 120)
        added = longer.expires_at - self.sandbox.expires_at
        self.assertAlmostEqual(added / datetime.timedelta(seconds=1), 120, delta=5)
        after = self.client.get_status(self.id)
        self.assertEqual(after.status, "running")
        self.assertLess(after.remaining_extend_seconds, before.remaining_extend_seconds)
        self.assertEqual(after.max_expires_at, before.max_expires_at)

    def test_no_extension_beyond_the_end_of_all(self):
        status = self.client.get_status(self.id)
        with self.assertRaises(Exception) as refused:
            self.client.extend(self.id, status.remaining_extend_seconds + 3600)
        self.assertIn(refused.exception.status_code, (400, 409))
        with self.refused(400):
            self.client.extend(self.id, -5)


@since(1, 1)
class Templates(Case):
    def test_the_catalogue_can_be_read_searched_and_used(self):
        templates = self.client.list_templates()
        self.assertIn("base", [one.id for one in templates])
        for one in templates:
            self.assertEqual(self.client.get_template(one.id).id, one.id)
            self.assertIn(one.id, [x.id for x in self.client.list_templates(category=one.category)])
        self.assertEqual(self.client.list_templates(search="nothing is called like this"), [])
        made = self.client.create_from_template(
            "base", timeout_seconds=300, env={"A": "b"}, override_cpus="1", override_memory="256Mi"
        )
        self.assertEqual((made.status, made.memory), ("running", "256Mi"))
        self.assertEqual(self.shell(made.sandbox_id, "printenv A"), "b\n")
        self.client.stop(made.sandbox_id)

    def test_one_that_does_not_exist(self):
        with self.refused(404):
            self.client.get_template("no-such-template")
        with self.refused(400, "VALIDATION_ERROR") as refusal:
            self.client.create_from_template("no-such-template")
        self.assertIn("template_id", str(refusal.error))


@since(2, 1)
class Facades(Case):
    def test_the_sandbox_object(self):
        from stateset_sandbox.sandbox import Sandbox

        import os

        os.environ["STATESET_API_KEY"] = self.client.auth_token
        with Sandbox.create(timeout_seconds=300, env={"B": "c"}) as box:
            self.assertEqual(box.exec("printenv B").stdout, "c\n")
            box.write_files([{"path": "/workspace/x/y.txt", "content": "päth"}])
            self.assertEqual(box.read_file("/workspace/x/y.txt"), "päth")
            self.assertEqual([f["name"] for f in box.list_files("/workspace/x")], ["y.txt"])
            again = Sandbox.connect(box.id)
            self.assertEqual(again.session_id, box.session_id)
            self.assertEqual(again.extend(60).id, box.id)
        self.assertEqual(self.client.get(box.id).status, "terminated")

    def test_the_asynchronous_one(self):
        import asyncio

        from stateset_sandbox.async_sandbox import AsyncSandbox

        async def story():
            async with await AsyncSandbox.create(
                api_key=self.client.auth_token, base_url=self.client.base_url, timeout_seconds=300
            ) as box:
                results = await asyncio.gather(*(box.exec(["echo", str(n)]) for n in range(5)))
                self.assertEqual([r.stdout for r in results], [f"{n}\n" for n in range(5)])
                await box.write_file("/workspace/a.txt", "a")
                await box.write_files([{"path": "/workspace/b.txt", "content": "b"}])
                self.assertEqual(await box.read_file("/workspace/b.txt"), "b")
                names = {f["name"] for f in await box.list_files("/workspace")}
                self.assertLessEqual({"a.txt", "b.txt"}, names)
                self.assertEqual((await box.extend(30))["sandbox_id"], box.id)
                return box.id

        self.assertEqual(self.client.get(asyncio.run(story())).status, "terminated")

    def test_the_code_interpreter(self):
        import os
        import tempfile

        from stateset_sandbox.code_interpreter import CodeInterpreter

        with CodeInterpreter(self.client, timeout_seconds=300) as interpreter:
            self.assertEqual(interpreter.run("print(6 * 7)").stdout, "42\n")
            self.assertEqual(interpreter.run("console.log(6 * 7)", "node").stdout, "42\n")
            self.assertEqual(interpreter.run("echo $((6 * 7))", "bash").stdout, "42\n")
            self.assertEqual(interpreter.run("raise SystemExit(3)").exit_code, 3)
            made = interpreter.run(
                "import os; os.makedirs('/workspace/artifacts/deep', exist_ok=True);"
                "open('/workspace/artifacts/deep/a.txt', 'w').write('x')"
            )
            self.assertIn("/workspace/artifacts/deep/a.txt", made.artifacts)
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "data.bin")
                data = bytes(range(256)) * 300
                with open(path, "wb") as file:
                    file.write(data)
                remote = interpreter.upload(path)
                self.assertEqual(interpreter.download(remote), data)
