"""Fixtures of the integration tests."""

from uuid import uuid4

import pytest


@pytest.fixture(autouse=True)
def _memory_broker(_clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Applications use a broker in this process, and a queue that no other test has put a message on."""
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    monkeypatch.setenv("SPAKKY_CELERY__RESULT_BACKEND", "cache+memory://")
    monkeypatch.setenv("SPAKKY_CELERY__APP_NAME", f"test-{uuid4().hex[:12]}")
