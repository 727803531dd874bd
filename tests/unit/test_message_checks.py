"""What is looked at in a message before Celery does."""

import json
from types import SimpleNamespace

import pytest

from spakky.plugins.celery.worker.message_checks import find_request_problem

OTHERS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def nested(depth: int) -> object:
    """Lists and dicts in each other, so many with the innermost."""
    value: object = []
    for level in range(depth - 1):
        value = [value] if level % 2 else {"inner": value}
    return value


@pytest.mark.parametrize("text", ["", "x" * 5000, "[{" * 500])
@pytest.mark.parametrize(("depth", "is_refused"), [(1, False), (198, False), (199, True), (400, True)])
@pytest.mark.parametrize("encoding", ["", "utf-8"])
def test_depth_is_counted_whatever_the_texts(text: str, depth: int, is_refused: bool, encoding: str) -> None:
    """Brackets in a text are none of the body's; the body itself and its arguments count as two."""
    payload = [[text, nested(depth)], {}, OTHERS]
    body = json.dumps(payload)
    message = SimpleNamespace(body=body.encode(encoding) if encoding else body)
    request = SimpleNamespace(_payload=payload, message=message, request_dict={"task": "a", "id": "b"})
    assert (find_request_problem(request) is not None) is is_refused
