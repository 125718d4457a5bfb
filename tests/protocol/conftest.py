from pathlib import Path

import pytest

from tests.protocol.service import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Service:
    """One server for a module's tests that leave it whole."""
    started = Service(tmp_path_factory.mktemp("home")).start()
    yield started
    started.stop()


@pytest.fixture
def services(tmp_path: Path):
    """Makes servers for one test, which may kill them."""
    made = []

    def make(home: str = "home", **options) -> Service:
        made.append(Service(tmp_path / home, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def client(service: Service):
    with service.client() as made:
        yield made
