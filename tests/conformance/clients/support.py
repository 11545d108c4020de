"""What the cases share: who asks, a sandbox to ask about, and the record of which methods were called."""

import functools
import importlib.metadata
import os
import unittest
import uuid

import stateset_sandbox as sdk
from stateset_sandbox import StateSetSandbox, types

URL = os.environ["STATESET_BASE_URL"]
VERSION = tuple(int(part) for part in importlib.metadata.version("stateset-sandbox").split("."))

# Names of the client's methods that some case called.
CALLED = set()


def since(*version):
    """Skips what this version of the client does not have: the older one has its own case of the same kind."""
    return unittest.skipIf(VERSION < version, "not in this version")


def methods():
    """The client's public methods."""
    return {
        name
        for name, value in vars(StateSetSandbox).items()
        if callable(value) and not name.startswith("_")
    }


class Recorded(StateSetSandbox):
    """The published client, unchanged, which notes what is called."""


def _recorded(name):
    published = getattr(StateSetSandbox, name)

    @functools.wraps(published)
    def call(self, *args, **kwargs):
        CALLED.add(name)
        return published(self, *args, **kwargs)

    return call


for _name in methods():
    setattr(Recorded, _name, _recorded(_name))


def unique(word):
    return f"{word}-{uuid.uuid4().hex[:10]}"


def registered():
    """A new organisation."""
    name = unique("org")
    request = types.RegistrationRequest(
        email=f"{name}@example.test",
        organization_name=name,
        first_name="Ada",
        last_name="L",
        use_case="conformance",
    )
    return sdk.register(URL, request)


_registration = None


def registration():
    """The organisation that the cases share."""
    global _registration
    if _registration is None:
        _registration = registered()
    return _registration


def client(key=None, **options):
    return Recorded(base_url=URL, auth_token=key or registration().api_key.key, **options)


class Case(unittest.TestCase):
    """A case with a client."""

    maxDiff = 4000

    @classmethod
    def setUpClass(cls):
        cls.client = client()

    @classmethod
    def tearDownClass(cls):
        cls.client.close()

    def refused(self, status, code=None):
        """Expects the API's refusal in the client's own exception."""
        return Refusal(self, status, code)

    def shell(self, sandbox_id, line):
        """What a command prints, which must succeed."""
        result = self.client.execute(sandbox_id, line)
        self.assertEqual(result.exit_code, 0, result)
        return result.stdout


class WithSandbox(Case):
    """A case with a sandbox of its own class."""

    options = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sandbox = cls.client.create(cls.options)
        cls.id = cls.sandbox.sandbox_id

    @classmethod
    def tearDownClass(cls):
        cls.client.stop(cls.id)
        super().tearDownClass()


class Refusal:
    def __init__(self, case, status, code):
        self.case, self.status, self.code, self.error = case, status, code, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        self.case.assertIsNotNone(kind, f"nothing was refused; expected {self.status}")
        if not isinstance(error, sdk.SandboxApiError):
            return False
        self.error = error
        self.case.assertEqual(error.status_code, self.status, error)
        if self.code is not None:
            self.case.assertEqual(error.code, self.code, error)
        return True
