"""What is done once, at the end of a batch."""

import threading

import pytest

from spakky.plugins.celery.common.batches import at_batch_end, batch


def test_calls_are_made_once_when_the_outermost_block_ends() -> None:
    """In the order in which they were asked for."""
    made: list[str] = []
    first, second = (lambda: made.append("first")), (lambda: made.append("second"))
    with batch():
        assert at_batch_end(first)
        with batch():
            assert at_batch_end(second)
            assert at_batch_end(first)
        assert made == []
    assert made == ["first", "second"]
    assert not at_batch_end(first)


def test_a_batch_is_of_one_thread() -> None:
    """Others are told that none is open."""
    found: list[bool] = []
    with batch():
        thread = threading.Thread(target=lambda: found.append(at_batch_end(lambda: None)))
        thread.start()
        thread.join()
    assert found == [False]


def test_a_block_and_a_call_that_fail() -> None:
    """All other calls are made, and the next batch knows nothing of them."""
    made: list[str] = []

    def fail_in_a_batch() -> None:
        with batch():
            at_batch_end(lambda: 1 / 0)
            at_batch_end(lambda: made.append("after it"))
            raise KeyError

    with pytest.raises(ZeroDivisionError):
        fail_in_a_batch()
    assert made == ["after it"]
    with batch():
        assert at_batch_end(lambda: made.append("next"))
    assert made == ["after it", "next"]


def test_what_is_asked_for_at_the_end_is_for_no_batch() -> None:
    """Who asks does it at once."""
    found: list[bool] = []
    with batch():
        at_batch_end(lambda: found.append(at_batch_end(lambda: None)))
    assert found == [False]
