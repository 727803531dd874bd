"""What a handle makes of a stored failure that this process cannot, or must not, rebuild."""

import asyncio
import json
import sys
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery

from spakky.plugins.celery.common.task_result import CeleryTaskResult, TaskState
from spakky.plugins.celery.error import RemoteTaskError, UntrustedResultError

TRACEBACK = 'Traceback (most recent call last):\n  File "shop.py", line 4, in charge\nshop.cards.CardError: no money\n'


class KeywordError(Exception):
    """Takes nothing by position."""

    def __init__(self, *, code: int) -> None:
        super().__init__(code)


def handle_of(module: str | None, type_: str, *arguments: object) -> CeleryTaskResult[object]:
    """A handle over a failure that somebody wrote to the result back end."""
    celery = Celery("failures", broker="memory://", backend="cache+memory://", set_as_current=False)
    backend: Any = celery.backend
    id_ = str(uuid4())
    failure = {"exc_type": type_, "exc_message": list(arguments), "exc_module": module}
    meta = {"status": "FAILURE", "result": failure, "traceback": TRACEBACK, "children": [], "task_id": id_}
    backend.set(backend.get_key_for_task(id_), json.dumps(meta))
    return CeleryTaskResult(celery.AsyncResult(id_))


def errors_of(handle: CeleryTaskResult[object], class_: type[Exception]) -> list[Any]:
    """What get(), get_async() and error() give."""
    with pytest.raises(class_) as waited:
        handle.get(timeout=5)
    with pytest.raises(class_) as awaited:
        asyncio.run(handle.get_async(timeout=5))
    return [waited.value, awaited.value, handle.error()]


@pytest.mark.parametrize(
    ("module", "type_", "type_name"),
    [
        ("shop.cards", "CardError", "shop.cards.CardError"),
        ("this", "CardError", "shop.cards.CardError"),
        (None, "CardError", "shop.cards.CardError"),
        (__name__, "KeywordError", f"{__name__}.KeywordError"),
    ],
)
def test_a_class_that_is_not_here(module: str | None, type_: str, type_name: str) -> None:
    """A stand-in comes in its place, and no module is imported because a message names it."""
    for error in errors_of(handle_of(module, type_, "no money"), RemoteTaskError):
        assert error.type_name == type_name
        assert "no money" in error.text
        assert error.remote_traceback == TRACEBACK
        assert error.__notes__ == [f"Raised in the worker:\n{TRACEBACK}"]
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("module", "type_", "argument"),
    [
        ("os", "system", "exit 1"),
        ("builtins", "exec", "raise SystemExit"),
        ("builtins", "SystemExit", "0"),
        ("builtins", "KeyboardInterrupt", ""),
        ("asyncio.exceptions", "CancelledError", ""),
    ],
)
def test_what_must_not_be_rebuilt(module: str, type_: str, argument: str) -> None:
    """What is no exception class is not called, and what would end the process or a coroutine is not raised."""
    handle = handle_of(module, type_, argument)
    with pytest.raises(UntrustedResultError, match=type_) as caught:
        handle.get(timeout=5)
    assert caught.value.task_id == handle.task_id
    with pytest.raises(UntrustedResultError, match=type_):
        asyncio.run(handle.get_async(timeout=5))
    try:
        error = handle.error()
    except UntrustedResultError as refused:
        error = refused
    assert isinstance(error, UntrustedResultError)


def test_an_interrupt_while_waiting_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during get() ends the wait as itself."""
    celery = Celery("failures", broker="memory://", backend="cache+memory://", set_as_current=False)
    handle = CeleryTaskResult[object](celery.AsyncResult(str(uuid4())))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(celery.backend, "get_task_meta", interrupt)
    with pytest.raises(KeyboardInterrupt):
        handle.get(timeout=5)
    monkeypatch.undo()
    assert handle.state is TaskState.PENDING
