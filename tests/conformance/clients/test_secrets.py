"""Secrets."""

from stateset_sandbox import types

from support import WithSandbox, unique


class Secrets(WithSandbox):
    def test_a_secret_is_kept_injected_changed_and_removed(self):
        name = unique("TOKEN").replace("-", "_").upper()
        value = "v-0123456789-abcdef"
        made = self.client.create_secret(types.CreateSecretOptions(name=name, value=value))
        self.assertEqual((made.name, made.scope), (name, "sandbox"))
        self.assertIsNotNone(made.updated_at)
        listed = self.client.list_secrets()
        self.assertIn(name, [one.name for one in listed])
        self.assertNotIn(value, str(listed))
        self.assertEqual(self.client.inject_secrets(self.id, [name]), [name])
        # Without `egress` bindings, which published clients cannot send, it is a plain variable.
        self.assertEqual(self.shell(self.id, f"printenv {name}").strip(), value)
        self.assertEqual(self.client.update_secret(name, "other-0123456789").name, name)
        self.assertIn(name, self.client.inject_secrets(self.id, all_secrets=True))
        self.assertIs(self.client.delete_secret(name), True)
        self.assertNotIn(name, [one.name for one in self.client.list_secrets()])

    def test_what_is_not_there(self):
        for call in [
            lambda: self.client.update_secret("NO_SUCH", "x-0123456789"),
            lambda: self.client.delete_secret("NO_SUCH"),
            lambda: self.client.inject_secrets(self.id, ["NO_SUCH"]),
        ]:
            with self.refused(404):
                call()
