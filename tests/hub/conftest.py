"""A Hub for all tests of this folder, and a process that talks to it."""

import pytest
from client import Client
from server import Hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A Hub without repositories; what a test adds stays, so each names its own."""
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(autouse=True)
def forget(hub):
    """Start every test with an empty log and no faults."""
    hub.clear()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder of the client's cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def client(hub, home, tmp_path_factory):
    """A process that stays, as the Hub's writer."""
    client = Client(hub.environment(home), tmp_path_factory.mktemp("here"))
    yield client
    client.close()


@pytest.fixture
def environment(hub, tmp_path):
    """What a process of its own needs to talk to the Hub as its writer, with an empty cache: `run(..., **environment)`.

    With `code=2` and the like as `command_line.run` takes them.
    """
    return hub.environment(tmp_path / "home")
