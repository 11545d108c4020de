"""Registration, keys, billing."""

from stateset_sandbox import types

from support import URL, Case, client, registered, registration, sdk, unique


class Registration(Case):
    def test_everything_that_the_client_needs_is_there(self):
        answer = registration()
        self.assertTrue(answer.organization.id)
        self.assertTrue(answer.organization.slug)
        self.assertEqual(answer.organization.plan, "self-hosted")
        self.assertIn("@example.test", answer.user.email)
        self.assertTrue(answer.user.role)
        self.assertTrue(answer.api_key.key.startswith(answer.api_key.key_prefix))

    def test_a_key_needs_no_organisation_beside_it(self):
        # Three parts: every published version takes it for a token that names its organisation.
        self.assertEqual(len(registration().api_key.key.split(".")), 3)
        with client() as other:
            self.assertIsInstance(other.list(), list)

    def test_naming_the_own_organisation_is_fine_and_another_is_refused(self):
        with client(org_id=registration().organization.id) as other:
            self.assertIsInstance(other.list(), list)
        with client(org_id=registered().organization.id) as other, self.refused(403, "FORBIDDEN"):
            other.list()

    def test_an_address_registers_once(self):
        request = types.RegistrationRequest(
            email=registration().user.email, organization_name=unique("again")
        )
        with self.refused(409):
            sdk.register(URL, request)

    def test_an_address_that_is_none_is_refused(self):
        with self.refused(400, "VALIDATION_ERROR"):
            sdk.register(URL, types.RegistrationRequest(email="nobody", organization_name="x"))


class Keys(Case):
    def test_a_key_is_made_shown_used_and_revoked(self):
        name = unique("key")
        made = self.client.create_api_key(
            types.CreateApiKeyOptions(
                name=name, expires_in_days=7, scopes=["sandbox:create", "sandbox:execute"]
            )
        )
        self.assertEqual(made.api_key.name, name)
        self.assertTrue(made.key.startswith(made.api_key.key_prefix))
        self.assertIn("sandbox:create", made.api_key.scopes)
        self.assertGreater(made.api_key.expires_at, made.api_key.created_at)
        listed = {key.id: key for key in self.client.list_api_keys()}
        self.assertEqual(listed[made.api_key.id].name, name)
        self.assertNotIn(made.key, str(listed))
        self.assertIs(self.client.revoke_api_key(made.api_key.id), True)
        with client(made.key) as other, self.refused(401, "UNAUTHORIZED"):
            other.list()

    def test_a_key_that_does_not_exist(self):
        with client("sk_sandbox_none.none.none") as other, self.refused(401, "UNAUTHORIZED"):
            other.list()
        with self.refused(404):
            self.client.revoke_api_key("key_none")


class Billing(Case):
    def test_who_hosts_himself_pays_nobody(self):
        answer = self.client.get_subscription()
        self.assertIsNone(answer.subscription)
        self.assertEqual(answer.plan, "self-hosted")
        self.assertEqual(self.client.list_invoices(limit=3), [])

    def test_there_is_nothing_to_buy(self):
        for call in [
            lambda: self.client.upgrade_plan("pro", "https://a.test", "https://b.test"),
            lambda: self.client.get_billing_portal("https://a.test"),
        ]:
            with self.assertRaises(sdk.SandboxApiError) as refused:
                call()
            self.assertIn(refused.exception.status_code, range(400, 429))
