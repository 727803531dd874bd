"""Fixtures of all tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

# A busy machine takes its time for an example, and that is no failure of what is tested.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches an application under test."""
    for name in list(os.environ):
        if name.startswith("SPAKKY_") and not name.startswith("SPAKKY_TEST_"):
            monkeypatch.delenv(name)
