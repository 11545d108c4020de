"""Files."""

import base64

from support import WithSandbox, since


class ReadAndWrite(WithSandbox):
    def test_text_comes_back_and_folders_are_made(self):
        self.client.write_file(self.id, "/workspace/a/b/c.txt", "häl\nlo")
        self.assertEqual(self.client.read_file(self.id, "/workspace/a/b/c.txt"), "häl\nlo")
        self.assertEqual(self.shell(self.id, "cat /workspace/a/b/c.txt"), "häl\nlo")
        raw = self.client.read_file_raw(self.id, "/workspace/a/b/c.txt")
        self.assertEqual(base64.b64decode(raw.content), "häl\nlo".encode())
        self.assertEqual(raw.size, len("häl\nlo".encode()))

    def test_several_at_once(self):
        self.client.write_files(
            self.id,
            [{"path": f"/workspace/many/{n}", "content": str(n) * n} for n in range(20)],
        )
        self.assertEqual(self.client.read_file(self.id, "/workspace/many/19"), "19" * 19)
        self.assertEqual(self.client.read_file(self.id, "/workspace/many/0"), "")

    def test_five_megabytes(self):
        text = "0123456789abcdef" * (5 << 16)
        self.client.write_file(self.id, "/workspace/large", text)
        self.assertEqual(self.client.read_file(self.id, "/workspace/large"), text)

    def test_what_is_not_there(self):
        with self.refused(404):
            self.client.read_file(self.id, "/workspace/nothing")


@since(2, 1)
class Verbs(WithSandbox):
    def setUp(self):
        self.shell(self.id, "rm -rf /workspace/v && mkdir -p /workspace/v")

    def names(self, path, **options):
        return sorted(entry["path"] for entry in self.client.list_files(self.id, path, **options))

    def test_list(self):
        self.shell(self.id, "cd /workspace/v && mkdir d && echo 1 > d/x.py && printf 12345 > f && ln -s f l")
        entries = {entry["name"]: entry for entry in self.client.list_files(self.id, "/workspace/v")}
        self.assertEqual(sorted(entries), ["d", "f", "l"])
        self.assertEqual(entries["f"]["size"], 5)
        self.assertEqual(entries["f"]["path"], "/workspace/v/f")
        self.assertEqual(entries["d"]["type"], "directory")
        self.assertEqual(entries["f"]["type"], "file")
        self.assertRegex(entries["f"]["modified_at"], r"^\d{4}-\d\d-\d\dT.*(Z|\+00:00)$")
        self.assertIn("/workspace/v/d/x.py", self.names("/workspace/v", recursive=True))
        self.assertIn("/workspace/v", self.names("/workspace"))
        with self.refused(404):
            self.client.list_files(self.id, "/workspace/none")

    def test_glob(self):
        self.shell(self.id, "cd /workspace/v && mkdir -p d/e && touch a.py d/b.py d/e/c.py d/e/c.js")
        found = sorted(entry["path"] for entry in self.client.glob(self.id, "v/**/*.py"))
        self.assertEqual(found, ["/workspace/v/a.py", "/workspace/v/d/b.py", "/workspace/v/d/e/c.py"])
        self.assertEqual(self.client.glob(self.id, "*.none"), [])

    def test_make_move_copy_and_delete(self):
        self.client.mkdir(self.id, "/workspace/v/one/two")
        with self.refused(404):
            self.client.mkdir(self.id, "/workspace/v/three/four", recursive=False)
        self.client.write_file(self.id, "/workspace/v/one/f", "text")
        self.client.copy_file(self.id, "/workspace/v/one/f", "/workspace/v/one/g")
        self.client.move_file(self.id, "/workspace/v/one/f", "/workspace/v/h")
        self.assertEqual(self.client.read_file(self.id, "/workspace/v/h"), "text")
        self.assertEqual(self.client.read_file(self.id, "/workspace/v/one/g"), "text")
        with self.refused(404):
            self.client.read_file(self.id, "/workspace/v/one/f")
        self.client.delete_file(self.id, "/workspace/v/h")
        with self.assertRaises(Exception) as refused:
            self.client.delete_file(self.id, "/workspace/v/one")
        self.assertIn(refused.exception.status_code, (400, 409))
        self.client.delete_file(self.id, "/workspace/v/one", recursive=True)
        self.assertEqual(self.names("/workspace/v"), [])
        for call in [
            lambda: self.client.delete_file(self.id, "/workspace/v/h"),
            lambda: self.client.move_file(self.id, "/workspace/v/h", "/workspace/v/i"),
            lambda: self.client.copy_file(self.id, "/workspace/v/h", "/workspace/v/i"),
        ]:
            with self.refused(404):
                call()

    def test_nothing_leads_out(self):
        self.shell(self.id, "ln -sfn /proc/1 /workspace/v/proc && ln -sfn /etc/shadow /workspace/v/shadow")
        for path in ["/proc/1/mem", "/workspace/v/proc/environ", "/workspace/v/shadow", "/proc/1/root/etc/shadow"]:
            with self.subTest(path), self.assertRaises(Exception) as refused:
                self.client.read_file(self.id, path)
            self.assertIn(refused.exception.status_code, (400, 403, 404, 409))
