"""Commands."""

from support import VERSION, WithSandbox, since


class Execute(WithSandbox):
    def test_a_line_and_a_list(self):
        self.assertEqual(self.shell(self.id, "echo a | tr a b"), "b\n")
        self.assertEqual(self.shell(self.id, ["echo", "a | tr a b"]), "a | tr a b\n")

    def test_output_is_told_apart_and_codes_are_real(self):
        result = self.client.execute(self.id, "echo out; echo err >&2; exit 7")
        self.assertEqual((result.exit_code, result.stdout, result.stderr), (7, "out\n", "err\n"))
        self.assertEqual(self.client.execute(self.id, "kill -9 $$").exit_code, 128 + 9)
        self.assertEqual(self.client.execute(self.id, ["/no/such/program"]).exit_code, 127)

    def test_environment_and_directory(self):
        result = self.client.execute(self.id, "printenv X; pwd", env={"X": "y z"}, cwd="/tmp")
        self.assertEqual(result.stdout, "y z\n/tmp\n")
        if VERSION >= (1, 0, 4):
            result = self.client.execute(self.id, "pwd", working_dir="/workspace")
            self.assertEqual(result.stdout, "/workspace\n")

    def test_time_ends_a_command_and_no_exception_is_raised(self):
        self.assertEqual(self.client.execute(self.id, "sleep 60", timeout=300).exit_code, 124)

    def test_bytes_that_are_no_text(self):
        result = self.client.execute(self.id, r"printf '\377\376x'")
        self.assertEqual((result.exit_code, result.stdout[-1]), (0, "x"))

    @since(2, 1)
    def test_long_output_is_cut_and_says_so(self):
        result = self.client.execute(self.id, "head -c 30000000 /dev/zero | tr '\\0' x")
        self.assertEqual(result.exit_code, 0)
        self.assertIs(result.output_truncated, True)
        self.assertFalse(self.client.execute(self.id, "echo x").output_truncated)


class Stream(WithSandbox):
    def collect(self, command, **options):
        heard = {"out": "", "err": "", "codes": [], "errors": []}

        def add(name):
            def more(text):
                heard[name] += text

            return more

        self.client.execute_stream(
            self.id,
            command,
            on_stdout=add("out"),
            on_stderr=add("err"),
            on_exit=heard["codes"].append,
            on_error=heard["errors"].append,
            **options,
        )
        return heard

    def test_output_and_the_end(self):
        heard = self.collect("for n in 1 2 3; do echo $n; done; echo no >&2; exit 5")
        self.assertEqual((heard["out"], heard["err"]), ("1\n2\n3\n", "no\n"))
        self.assertEqual((heard["codes"], heard["errors"]), ([5], []))

    def test_separators_that_python_takes_for_line_ends(self):
        text = "a\u2028b\u2029c\u0085d"
        heard = self.collect(["printf", "%s", text])
        self.assertEqual(heard["out"], text)

    def test_letters_that_come_in_pieces(self):
        line = r"printf '\303'; sleep 0.2; printf '\244'; sleep 0.2; printf '\360\237'; sleep 0.2; printf '\230\200'"
        self.assertEqual(self.collect(line)["out"], "ä😀")

    def test_options(self):
        heard = self.collect("printenv X; pwd", env={"X": "1"}, cwd="/tmp")
        self.assertEqual(heard["out"], "1\n/tmp\n")
        self.assertEqual(self.collect("sleep 60", timeout=300)["codes"], [124])

    def test_a_refusal_is_an_exception(self):
        with self.refused(404):
            self.client.execute_stream("sandbox-00000000", "true")
