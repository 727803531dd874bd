"""Fixtures of all tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches an application under test."""
    for name in list(os.environ):
        if name.startswith("SPAKKY_") and not name.startswith("SPAKKY_TEST_"):
            monkeypatch.delenv(name)
