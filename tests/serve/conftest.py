"Fixtures: a model file, a service with its client, a real server, and a web server to fetch from."

import pytest
from serving import LOCAL, Running, WebServer, small_model
from starlette.testclient import TestClient

from snn.data.models import write
from snn.serve.api import Settings, create
from snn.serve.fetch import Limits
from snn.serve.model import Live, Sources


@pytest.fixture
def model_path(tmp_path):
    write(small_model(), tmp_path / "params.h5")
    return tmp_path / "params.h5"


@pytest.fixture
def make_client(model_path):
    "Make a client of a service with other settings."
    clients = []

    def make(**settings):
        client = TestClient(create(Live(Sources(model_path)), Settings(**settings)))
        clients.append(client.__enter__())
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client):
    return make_client()


@pytest.fixture
def local_client(make_client):
    return make_client(network=LOCAL, fetching=Limits(seconds=1.0, size=2**20))


@pytest.fixture
def running(model_path):
    "Start a real server on a free port."
    started = []

    def start(**settings):
        started.append(Running(model_path, **settings))
        return started[-1].url, started[-1].app

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def web():
    "The running web server to fetch from."
    server = WebServer()
    yield server
    server.shutdown()
