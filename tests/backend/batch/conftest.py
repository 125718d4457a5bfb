"""A home of Kiln's that all batches of the tests share, because a backend takes seconds to warm up."""

import pytest

from tests.backend.batch.bench import Bench


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    yield home
    Bench(home, home).begin(command="stop").communicate(timeout=60)  # perhaps none runs any more


@pytest.fixture
def bench(tmp_path, home):
    return Bench(tmp_path, home)
