"""Ids of tasks: their form, and that no two are the same."""

import os
from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122, UUID

import pytest

from spakky.plugins.celery.common.fresh_ids import make_id


def test_an_id_is_a_random_uuid() -> None:
    """Each has the form, the version and the variant of ``uuid4``."""
    for id_ in (make_id() for _ in range(1000)):
        parsed = UUID(id_)
        assert str(parsed) == id_
        assert (parsed.version, parsed.variant) == (4, RFC_4122)


def test_threads_get_ids_of_their_own() -> None:
    """Eight threads that make ids at once make no id twice."""
    with ThreadPoolExecutor(8) as executor:
        made = [id_ for ids in executor.map(lambda _: [make_id() for _ in range(2000)], range(8)) for id_ in ids]
    assert len(set(made)) == len(made) == 16_000


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_ids_of_its_own() -> None:
    """A child makes none that its parent makes too."""
    make_id()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, "".join(make_id() for _ in range(100)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    childs = {text[at : at + 36] for at in range(0, len(text), 36)}
    assert len(childs) == 100
    assert not childs & {make_id() for _ in range(200)}
