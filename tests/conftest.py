"""One small corpus and one cache for the whole session; every test has a store of its own."""

import os

import hypothesis
import pytest

# The same cases on every run: a suite that fails by chance is not read.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    """Long tests first: one that begins last leaves the other workers idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory, monkeypatch):
    """Nothing a test starts may look into the user's own store."""
    monkeypatch.setenv("MAQUETTE_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A corpus of six packages of Python files, a cache, and the runs made so far."""
    from maquette.conformance import World

    return World.make(tmp_path_factory.mktemp("world"))
