"""Which tasks one application has."""

import pytest
from spakky.task import DuplicateTaskError, TaskHandler, task

from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_method import TaskMethod, find_task_methods
from spakky.plugins.celery.error import (
    AmbiguousHandlerPodError,
    DuplicateTaskNameError,
    TaskNotRegisteredError,
    UnsupportedTaskMethodError,
)
from support import handlers


@pytest.fixture
def catalog() -> TaskCatalog:
    return TaskCatalog()


def method_of(handler: type, attribute: str) -> TaskMethod:
    (method,) = [method for method in find_task_methods(handler) if method.attribute == attribute]
    return method


def make_twin() -> type:
    @TaskHandler()
    class Twin:
        @task
        def run(self) -> None: ...

    return Twin


def test_an_added_handler_has_its_tasks(catalog: TaskCatalog) -> None:
    """Every task of an added class is there, and no other."""
    catalog.add(handlers.Inherits, "inherits")
    assert {method.name for method in catalog} == {
        "support.handlers.Inherits.clean",
        "support.handlers.Inherits.name_class",
    }
    assert catalog.methods_of(handlers.Inherits) == tuple(catalog)
    assert catalog.methods_of(handlers.Base) == catalog.methods_of(handlers.Overrides) == ()
    assert catalog.contains_handler(handlers.Inherits)
    assert not catalog.contains_handler(handlers.Base)


def test_heirs_of_one_function_are_told_apart(catalog: TaskCatalog) -> None:
    """A task is in the catalog by its handler class: an heir's or a base's task of the same function is not."""
    catalog.add(handlers.Numbers, "numbers")
    assert method_of(handlers.Numbers, "echo") in catalog
    assert method_of(handlers.Words, "echo") not in catalog
    catalog.add(handlers.Words, "words")
    assert method_of(handlers.Words, "echo") in catalog
    assert catalog.handlers() == (handlers.Numbers, handlers.Words)


def test_adding_again_adds_pods_and_no_tasks(catalog: TaskCatalog) -> None:
    """A handler class has each task once, and each Pod name once, in the order of adding."""
    for name in ("second", "first", "second"):
        catalog.add(handlers.Tagged, name)
    assert catalog.pods_of(handlers.Tagged) == ("second", "first")
    assert catalog.handlers() == (handlers.Tagged,)
    assert len(tuple(catalog)) == 2


def test_a_duplicate_names_both(catalog: TaskCatalog) -> None:
    """Two classes that claim one name are refused, with the place of each."""
    first, second = make_twin(), make_twin()
    catalog.add(first, "first")
    with pytest.raises(DuplicateTaskNameError) as caught:
        catalog.add(second, "second")
    error = caught.value
    assert isinstance(error, DuplicateTaskError)
    assert error.task == method_of(first, "run").name
    assert (error.first, error.second) == (method_of(first, "run").location, method_of(second, "run").location)
    assert error.first in str(error)
    assert "Twin.run (line " in error.second
    assert method_of(first, "run") in catalog
    assert method_of(second, "run") not in catalog


def test_what_cannot_be_a_task_is_not_added(catalog: TaskCatalog) -> None:
    """A handler with a member that cannot be a task is refused as a whole."""

    class Refused:
        @task
        def a_good_one(self) -> None: ...

        @staticmethod
        @task
        def static() -> None: ...

    with pytest.raises(UnsupportedTaskMethodError, match=r"Refused\.static"):
        catalog.add(Refused, "refused")
    assert tuple(catalog) == ()
    assert not catalog.contains_handler(Refused)


def test_a_run_goes_to_the_only_pod_or_the_named_one(catalog: TaskCatalog) -> None:
    """One Pod needs no name; of several only a name of theirs says which."""
    method = method_of(handlers.Tagged, "read_tag")
    catalog.add(handlers.Tagged, "first")
    assert catalog.pod_for(method, None) == catalog.pod_for(method, "first") == "first"
    catalog.add(handlers.Tagged, "second")
    assert catalog.pod_for(method, None) is None
    assert catalog.pod_for(method, "second") == "second"


@pytest.mark.parametrize("named", ["celery_app", "", 5, ["first"], {"first": 1}, b"first"], ids=repr)
def test_a_foreign_pod_name_is_refused(catalog: TaskCatalog, named: object) -> None:
    """A header cannot lead a run to a Pod that the handler does not have, whatever it holds."""
    catalog.add(handlers.Tagged, "first")
    with pytest.raises(AmbiguousHandlerPodError) as caught:
        catalog.pod_for(method_of(handlers.Tagged, "read_tag"), named)
    assert (caught.value.task, caught.value.pods) == ("support.handlers.Tagged.read_tag", ("first",))


def test_an_unknown_task_is_refused_with_the_nearest_names(catalog: TaskCatalog) -> None:
    """The error names the task that was called and the registered ones most like it."""
    catalog.add(handlers.Inherits, "inherits")
    catalog.check_registered(method_of(handlers.Inherits, "name_class"))
    with pytest.raises(TaskNotRegisteredError) as caught:
        catalog.check_registered(method_of(handlers.Overrides, "name_class"))
    assert caught.value.task == "support.handlers.Overrides.name_class"
    assert caught.value.nearest[0] == "support.handlers.Inherits.name_class"
    assert caught.value.nearest[0] in str(caught.value)


def test_a_name_alone_is_not_enough(catalog: TaskCatalog) -> None:
    """A task of another class with a registered name is not registered: another body would run."""
    first, second = make_twin(), make_twin()
    catalog.add(first, "first")
    with pytest.raises(TaskNotRegisteredError):
        catalog.check_registered(method_of(second, "run"))


def test_reading_while_adding(catalog: TaskCatalog) -> None:
    """A catalog that grows is read as it was: a late handler must not break a start-up in progress."""
    catalog.add(handlers.Inherits, "inherits")
    seen = []
    for method in catalog:
        catalog.add(handlers.Overrides, "overrides")
        seen.append(method.handler)
    assert seen == [handlers.Inherits] * 2
