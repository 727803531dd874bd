"""Every error: its text, its section in docs/errors.md, and its way through pickles and result back ends."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from spakky.auth.decision import AuthorizationDecision, AuthorizationDecisionState, AuthorizationReasonCode
from spakky.auth.error import AuthContextNotFoundError, AuthorizationError, AuthRequirementDeniedError
from spakky.core.common.error import AbstractSpakkyFrameworkError
from spakky.task.error import DuplicateTaskError

from spakky.plugins.celery import error as errors
from spakky.plugins.celery.error import AbstractSpakkyCeleryError

DOCS = Path(__file__).parent / "../../docs/errors.md"

FACTS: dict[str, dict[str, Any]] = {
    "InvalidCeleryConfigError": {
        "setting": "publish_timeout",
        "variable": "SPAKKY_CELERY__PUBLISH_TIMEOUT",
        "value": "0.0",
        "expected": "Give more than 0: seconds (90) or an ISO 8601 duration (PT1M30S).",
        "others": (
            (
                "SPAKKY_CELERY__BROKER (setting 'broker') is unknown, which cannot be used. Nearest to it: "
                "SPAKKY_CELERY__BROKER_URL, SPAKKY_CELERY__WORKER_POOL, SPAKKY_CELERY__QUEUE."
            ),
        ),
    },
    "InvalidTimezoneError": {
        "value": "Asia/Seul",
        "variable": "SPAKKY_CELERY__TIMEZONE",
        "nearest": ("Asia/Seoul", "Asia/Kabul", "Asia/Istanbul"),
    },
    "InvalidScheduleRouteError": {
        "handler": "shop.Reports",
        "method": "daily",
        "field": "crontab.hour",
        "value": "25",
        "expected": "Give a whole number from 0 to 23, a tuple of such numbers, or None for every hour.",
    },
    "InvalidTaskOptionError": {
        "target": "shop.Mailer.write",
        "option": "priority",
        "value": "12",
        "expected": "Give a whole number from 0 to 9, or None.",
    },
    "UnsupportedTaskMethodError": {
        "handler": "shop.Tools",
        "method": "clean",
        "reason": "it is a @staticmethod, which the container's proxy does not intercept, so a call would run inline.",
        "instead": "Write an instance method: drop @staticmethod, add self.",
    },
    "DuplicateTaskNameError": {
        "task": "shop.Mailer.write",
        "first": "shop:Mailer.write (line 12)",
        "second": "shop:Mailer.write (line 46)",
    },
    "AmbiguousCeleryPodError": {"pods": ("celery_a", "celery_b")},
    "AmbiguousHandlerPodError": {"task": "shop.Mailer.write", "pods": ("north", "south")},
    "InvalidApplicationTargetError": {"target": "shop:create_app", "reason": "shop has no attribute 'create_app'"},
    "TaskNotRegisteredError": {"task": "shop.Billing.refund", "nearest": ("shop.Mailer.write", "shop.Mailer.attach")},
    "TaskArgumentsError": {
        "task": "shop.Mailer.write",
        "reason": "text at $ should be a valid string, not 5 (int)",
        "signature": "(name: str, text: str)",
        "problems": ("text at $ should be a valid string, not 5 (int)",),
    },
    "TaskCompositionError": {
        "task": "shop.Mailer.write",
        "reason": "shop.Orders.place gives int, and its parameter 'name' takes str",
        "instead": "Join tasks whose result is what the next one takes first.",
    },
    "AmbiguousCallerIdentityError": {
        "task": "shop.Mailer.write",
        "reason": "other asyncio tasks, which may have stored it, share its values",
    },
    "TaskNotEncodableError": {
        "task": "shop.Mailer.attach",
        "serializer": "json",
        "reason": "Object of type object is not JSON serializable",
    },
    "TaskMessageTooLargeError": {"task": "shop.Mailer.write", "size": 162088, "limit": 114688},
    "TaskDelegationTooDeepError": {
        "task": "shop.Mailer.write",
        "depth": 3,
        "limit": 2,
        "chain": ("shop", "shop.Orders.place", "shop.Stock.reserve"),
    },
    "TaskBatchIncompleteError": {
        "task": "shop.Mailer.write",
        "total": 100,
        "sent": 60,
        "unknown": 1,
        "reason": "Connection closed by server.",
    },
    "TaskDispatchFailedError": {
        "task": "shop.Mailer.write",
        "broker": "redis://:**@127.0.0.1:1/0",
        "reason": "Error 111 connecting to 127.0.0.1:1. Connection refused.",
    },
    "TaskDispatchTimeoutError": {"task": "shop.Mailer.write", "broker": "redis://:**@127.0.0.1:6379/0", "seconds": 1.5},
    "AuthSnapshotPropagationSignerUnavailableError": {"task": "shop.Mailer.write"},
    "TaskCallerUnauthenticatedError": {"task": "shop.Billing.refund"},
    "TaskAuthorizationDeniedError": {
        "task": "shop.Billing.refund",
        "state": "DENY",
        "reason_code": "INSUFFICIENT_ROLE",
        "reason": "not in the list",
    },
    "TaskBodyCancelledError": {"task": "shop.Mailer.send"},
    "TaskResultMismatchError": {
        "task": "shop.Mailer.write",
        "problems": ("$ should be a valid string, not None (NoneType)",),
    },
    "TaskResultTimeoutError": {"task_id": "9d9f8a8e-0c9e-4f7e-8f9b-0a3a5a3b1c11", "seconds": 2.5},
    "TaskResultUnavailableError": {
        "task_id": "9d9f8a8e-0c9e-4f7e-8f9b-0a3a5a3b1c11",
        "reason": "no result back end is configured",
    },
    "TaskResultWaitInRunError": {"task_id": "9d9f8a8e-0c9e-4f7e-8f9b-0a3a5a3b1c11"},
    "TaskSealInvalidError": {"task": "shop.Mailer.write", "reason": "mismatch", "key_id": "2026-11"},
    "TaskMessageRefusedError": {
        "task": "shop.Mailer.write",
        "reason": "its body has 70000000 bytes, and 67108864 are taken",
        "size": 70000000,
        "limit": 67108864,
    },
    "UntrustedResultError": {
        "task_id": "9d9f8a8e-0c9e-4f7e-8f9b-0a3a5a3b1c11",
        "reason": "Expected an exception class, got os.system with payload ls",
    },
    "RemoteTaskError": {"type_name": "shop.payments.DeclinedError", "text": "card 4 of 4"},
    "NoCurrentRunError": {},
    "EagerTasksRefusedError": {},
    "TaskAuthNotConfiguredError": {
        "tasks": ("shop.Billing.refund", "shop.Billing.charge"),
        "missing": ("identities do not travel with messages", "the application has no Pod of IRoleChecker"),
        "expected": (
            "Set SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED=true. Add Pods of IRoleChecker; "
            "spakky-cryptography signs and verifies."
        ),
    },
    "SchedulePrincipalMissingError": {"task": "shop.Billing.close_month"},
    "NoResultInTestError": {
        "task_id": "9d9f8a8e-0c9e-4f7e-8f9b-0a3a5a3b1c11",
        "reason": "capture_tasks() recorded it, and nothing runs it",
        "instead": "Look at what was captured, or test results with run_inline().",
    },
    "ApplicationNotStartedError": {"function": "run_inline"},
    "UnsupportedWorkerOptionError": {
        "option": "worker_max_tasks_per_child",
        "value": "100",
        "reason": (
            "An AsyncioPool is one process that is never replaced: limit its memory from outside, or use prefork."
        ),
    },
}
"""What each error's constructor takes, in its order, as real calls gave it."""

HOST_BASES: dict[str, tuple[type[BaseException], ...]] = {
    "InvalidTimezoneError": (errors.InvalidCeleryConfigError,),
    "InvalidTaskOptionError": (ValueError,),
    "DuplicateTaskNameError": (DuplicateTaskError,),
    "TaskNotRegisteredError": (errors.AbstractTaskDispatchError,),
    "TaskArgumentsError": (errors.AbstractTaskDispatchError, TypeError),
    "TaskCompositionError": (errors.AbstractTaskDispatchError, TypeError),
    "TaskNotEncodableError": (errors.AbstractTaskDispatchError,),
    "TaskMessageTooLargeError": (errors.AbstractTaskDispatchError,),
    "TaskDelegationTooDeepError": (errors.AbstractTaskDispatchError,),
    "TaskBatchIncompleteError": (errors.AbstractTaskDispatchError,),
    "TaskDispatchFailedError": (errors.AbstractTaskDispatchError, ConnectionError),
    "TaskDispatchTimeoutError": (errors.AbstractTaskDispatchError, TimeoutError),
    "TaskResultMismatchError": (TypeError,),
    "TaskResultTimeoutError": (TimeoutError,),
    "TaskResultUnavailableError": (NotImplementedError,),
    "TaskResultWaitInRunError": (RuntimeError,),
    "NoCurrentRunError": (RuntimeError,),
    "NoResultInTestError": (errors.TaskResultUnavailableError, NotImplementedError),
    "ApplicationNotStartedError": (RuntimeError,),
    "TaskCallerUnauthenticatedError": (AuthContextNotFoundError,),
    "TaskAuthorizationDeniedError": (AuthRequirementDeniedError, AuthorizationError),
}
"""What callers may catch each error as, besides the plugin's and the framework's own base."""

ALL_CLASSES = {
    name: class_
    for name, class_ in vars(errors).items()
    if inspect.isclass(class_) and class_.__module__ == errors.__name__ and issubclass(class_, BaseException)
}
CONCRETE = sorted(name for name in ALL_CLASSES if not name.startswith("Abstract"))


def make(name: str) -> AbstractSpakkyCeleryError:
    return ALL_CLASSES[name](*FACTS[name].values())


def assert_same(name: str, error: BaseException) -> None:
    """It is the error that was made, with its facts, its text and its base classes."""
    expected = make(name)
    assert type(error) is type(expected)
    assert error.args == tuple(FACTS[name].values())
    assert {fact: getattr(error, fact) for fact in FACTS[name]} == FACTS[name]
    assert str(error) == str(expected)
    bases = (AbstractSpakkyCeleryError, AbstractSpakkyFrameworkError, *HOST_BASES.get(name, ()))
    assert all(isinstance(error, base) for base in bases)


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles = [part.partition("\n")[0] for part in parts]
    assert len(titles) == len(set(titles))
    return {title: part.partition("\n")[2] for title, part in zip(titles, parts, strict=True)}


def drawn_tree() -> dict[str, str | None]:
    """Read the tree of the docstring: each name and the name above it."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"    ([| ]*)(?:\+-- )?(\w+Error)(?:  .*)?", line)
        if found is None:
            continue
        depth = line.find("+--")
        path = [(above, name) for above, name in path if above < depth]
        assert found[2] not in parents
        parents[found[2]] = path[-1][1] if path else None
        path.append((depth, found[2]))
    return parents


def test_the_tables_of_this_file_name_every_error() -> None:
    """No error escapes the tests below."""
    assert sorted(FACTS) == CONCRETE


def test_every_error_is_public() -> None:
    """``__all__`` has each class of the module, and nothing else."""
    assert sorted(errors.__all__) == sorted(ALL_CLASSES)


def test_docs_have_one_section_for_each_error_in_the_order_of_the_module() -> None:
    """The link in each text leads to a section, and no section is about an error that is gone."""
    assert list(sections()) == [name for name in ALL_CLASSES if name in CONCRETE]


@pytest.mark.parametrize("name", CONCRETE)
def test_docs_show_the_real_text_and_every_attribute(name: str) -> None:
    """The example of a section is what the error says, and the section names each attribute."""
    section = sections()[name]
    assert f"```text\n{make(name)}\n```" in section
    attributes = section.partition("Attributes:")[2]
    assert re.findall(r"^- `(\w+)`", attributes, flags=re.MULTILINE) == list(FACTS[name])


def test_the_drawn_tree_is_the_real_tree() -> None:
    """The module's docstring names each class once, below the class that it derives from."""
    tree = drawn_tree()
    assert sorted(tree) == sorted(ALL_CLASSES)
    for name, parent in tree.items():
        expected = AbstractSpakkyFrameworkError if parent is None else ALL_CLASSES[parent]
        assert ALL_CLASSES[name].__bases__[0] is expected


@pytest.mark.parametrize("name", CONCRETE)
def test_constructor_is_positional_and_needs_no_argument(name: str) -> None:
    """``cls(*args)`` is how a result back end rebuilds an error, so no parameter is keyword-only or required."""
    parameters = inspect.signature(ALL_CLASSES[name]).parameters.values()
    assert [parameter.name for parameter in parameters] == list(FACTS[name])
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    assert all(parameter.default is not parameter.empty for parameter in parameters)


@pytest.mark.parametrize("name", CONCRETE)
def test_facts_are_args_and_attributes(name: str) -> None:
    """What a raise site passes can be read back, as ``args`` and by name."""
    assert_same(name, make(name))


@pytest.mark.parametrize("name", CONCRETE)
@pytest.mark.parametrize("build", [make, lambda name: ALL_CLASSES[name]()], ids=["facts", "nothing"])
def test_text_has_three_lines_and_the_link(name: str, build: Callable[[str], BaseException]) -> None:
    """Problem, remedy, link: each once, none empty, even for an error that was made without facts."""
    problem, remedy, link, *others = str(build(name)).splitlines()
    assert problem.endswith(".")
    assert remedy.endswith(".")
    assert not problem.endswith("..")
    assert link == f"See docs/errors.md#{name.lower()}"
    assert all(line.startswith("Also: ") for line in others)
    assert len(others) == len(getattr(build(name), "others", ()))


@pytest.mark.parametrize("name", CONCRETE)
def test_text_names_every_fact(name: str) -> None:
    """No fact is kept from the person who reads the error."""
    text = str(make(name))
    for fact in FACTS[name].values():
        parts = fact if isinstance(fact, tuple) else (fact,)
        assert all(str(part).rstrip(".") in text for part in parts)


def test_what_hosts_say_cannot_break_the_three_lines() -> None:
    """A reason with line ends, braces and a full stop of its own stays in its line."""
    error = errors.TaskDispatchFailedError("shop.Mailer.write", "redis://", "lost {0}\nwhile {task} went out.")
    assert str(error).splitlines()[0].endswith("redis://: lost {0} while {task} went out.")
    assert len(str(error).splitlines()) == 3


def test_a_note_does_not_break_the_text() -> None:
    """``add_note`` puts an attribute on the error that is none of its facts."""
    error = make("TaskArgumentsError")
    text = str(error)
    error.add_note("seen on Monday")
    assert str(error) == text


def test_a_subclass_of_an_application_needs_no_texts() -> None:
    """The documented base class serves those who give their errors a ``message``, as the framework's errors do."""

    class ShopError(AbstractSpakkyCeleryError):
        message = "The shop is closed"

    assert str(ShopError()) == "The shop is closed"
    assert str(ShopError("until Monday")) == "until Monday"


def test_a_subclass_may_have_a_constructor_of_its_own() -> None:
    """Facts are named where they are kept, not read off whatever constructor the subclass has."""

    class ShopBrokerError(errors.TaskDispatchFailedError):
        def __init__(self, shop: str = "") -> None:
            super().__init__("shop.Mailer.write", "redis://", f"{shop} is closed")

    error = ShopBrokerError("north")
    assert error.reason == "north is closed"
    assert "north is closed" in str(error)


@pytest.mark.parametrize("name", CONCRETE)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickle(name: str, protocol: int) -> None:
    """Prefork children hand their errors to the parent as pickles."""
    assert_same(name, pickle.loads(pickle.dumps(make(name), protocol)))


@pytest.mark.parametrize("name", CONCRETE)
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_errors_survive_copy(name: str, copier: Callable[[object], BaseException]) -> None:
    """Frameworks copy errors to raise them again."""
    assert_same(name, copier(make(name)))


@pytest.fixture(params=["file", "memory"])
def celery(request: pytest.FixtureRequest, tmp_path: Path) -> Celery:
    """A Celery app with a result back end that writes JSON."""
    backend = tmp_path.as_uri() if request.param == "file" else "cache+memory://"
    app = Celery("errors", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(result_serializer="json", accept_content=["json"])
    return app


@pytest.mark.parametrize("name", CONCRETE)
def test_errors_survive_the_json_result_back_end(name: str, celery: Celery) -> None:
    """The caller's ``get()`` raises the worker's error: same class, same facts, same text."""
    celery.backend.mark_as_failure(name, make(name))
    with pytest.raises(ALL_CLASSES[name]) as caught:
        celery.AsyncResult(name).get(timeout=5)
    assert_same(name, caught.value)


@pytest.mark.parametrize("name", CONCRETE)
def test_errors_survive_an_encoding_in_json(name: str, celery: Celery) -> None:
    """What the back end stores is plain JSON, and rebuilding loses nothing."""
    backend = celery.backend
    stored = backend.encode(backend.prepare_exception(make(name), serializer="json"))
    assert_same(name, backend.exception_to_python(backend.decode(stored)))


@pytest.mark.parametrize("name", CONCRETE)
def test_errors_without_facts_survive_the_json_result_back_end(name: str, celery: Celery) -> None:
    """An error that was raised bare arrives as its own class too."""
    celery.backend.store_result(name, ALL_CLASSES[name](), "FAILURE")
    with pytest.raises(ALL_CLASSES[name]) as caught:
        celery.AsyncResult(name).get(timeout=5)
    assert type(caught.value) is ALL_CLASSES[name]
    assert str(caught.value) == str(ALL_CLASSES[name]())


def test_the_decision_of_a_denial_survives_the_json_result_back_end(celery: Celery) -> None:
    """A caller reads why a worker refused, as the host's own decision object."""
    decision = AuthorizationDecision(
        state=AuthorizationDecisionState.CHALLENGE,
        reason_code=AuthorizationReasonCode.SNAPSHOT_EXPIRED,
    )
    denial = errors.TaskAuthorizationDeniedError.from_decision("shop.Billing.refund", decision)
    celery.backend.mark_as_failure("denied", denial)
    with pytest.raises(AuthRequirementDeniedError) as caught:
        celery.AsyncResult("denied").get(timeout=5)
    assert caught.value.decision == decision
