"""Fixtures of all tests."""

import os

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches an application under test."""
    for name in list(os.environ):
        if name.startswith("SPAKKY_") and not name.startswith("SPAKKY_TEST_"):
            monkeypatch.delenv(name)
