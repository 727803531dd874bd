"""Options: what is refused, which layer wins, and what they become."""

from datetime import UTC, datetime, timedelta
from inspect import getattr_static
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry
from hypothesis import given
from hypothesis import strategies as st
from spakky.auth.context import AuthContext, AuthSubject
from spakky.auth.error import AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.common.celery_options import to_publish_options, to_task_attributes
from spakky.plugins.celery.common.config import CeleryDelivery, CelerySerializer
from spakky.plugins.celery.common.task_method import TaskMethod, find_task_methods
from spakky.plugins.celery.error import (
    InvalidTaskOptionError,
    TaskArgumentsError,
    UnsupportedTaskMethodError,
)
from spakky.plugins.celery.options import (
    MessageOptions,
    RetryPolicy,
    TaskOptions,
    check_call_options,
    merge_options,
    own_options,
    resolve_options,
    schedule_options,
    task_options,
)

NOW = datetime.now(UTC)
NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001  # it is what is refused
TEN_YEARS = 10 * 365 * 24 * 3600


def decorate(**options: Any) -> Any:
    @task_options(**options)
    def send() -> None: ...

    return send


@pytest.mark.parametrize(
    ("options", "option", "told"),
    [
        ({"quue": "mail"}, "quue", "Did you mean queue?"),
        ({"after_midnight": 1}, "after_midnight", "Options are queue, routing_key,"),
        ({"queue": ""}, "queue", "not empty"),
        ({"queue": " mail"}, "queue", "no spaces"),
        ({"routing_key": 5}, "routing_key", "the queue's"),
        ({"priority": 10}, "priority", "0 to 9"),
        ({"priority": -1}, "priority", "0 to 9"),
        ({"priority": True}, "priority", "0 to 9"),
        ({"countdown": -1}, "countdown", "0 or more"),
        ({"countdown": timedelta(seconds=-1)}, "countdown", "0 or more"),
        ({"countdown": float("nan")}, "countdown", "0 or more"),
        ({"countdown": float("inf")}, "countdown", "0 or more"),
        ({"countdown": "5"}, "countdown", "0 or more"),
        ({"eta": NAIVE}, "eta", "time zone"),
        ({"countdown": 5, "eta": NOW}, "eta", "not both"),
        ({"expires": 0}, "expires", "more than 0"),
        ({"expires": NAIVE}, "expires", "time zone"),
        ({"time_limit": 0}, "time_limit", "more than 0"),
        ({"soft_time_limit": -5}, "soft_time_limit", "more than 0"),
        ({"soft_time_limit": 60, "time_limit": timedelta(minutes=1)}, "soft_time_limit", "less than time_limit"),
        ({"ignore_result": 1}, "ignore_result", "True, False"),
        ({"compression": 5}, "compression", "gzip"),
        ({"serializer": ""}, "serializer", "json"),
        ({"retry": 3}, "retry", "RetryPolicy(max_retries=5)"),
        ({"rate_limit": "10/d"}, "rate_limit", "10/m"),
        ({"rate_limit": "0/s"}, "rate_limit", "10/m"),
        ({"rate_limit": 0}, "rate_limit", "10/m"),
        ({"delivery": "exactly_once"}, "delivery", "at_least_once or at_most_once"),
        ({"track_started": "yes"}, "track_started", "True, False"),
        ({"seal": "off"}, "seal", "require"),
        ({"name": None}, "name", "not empty"),
        ({"aliases": "old"}, "aliases", "tuple"),
        ({"aliases": ("old", "old")}, "aliases", "each once"),
        ({"name": "mail", "aliases": ("mail",)}, "aliases", "own name"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_import(options: dict[str, Any], option: str, told: str) -> None:
    """The decorator itself refuses, naming what it decorates, the option, the value and what would be right."""
    with pytest.raises(InvalidTaskOptionError) as caught:
        decorate(**options)
    error = caught.value
    assert (error.target, error.option) == (f"{__name__}.decorate.<locals>.send", option)
    assert error.value == repr(options[option])
    assert told in error.expected


@pytest.mark.parametrize("name", ["name", "aliases"])
def test_a_class_has_no_name(name: str) -> None:
    """The tasks of a class cannot share a name."""
    options: Any = {"name": "mail", "aliases": ("mail",)}

    class Mailer: ...

    with pytest.raises(InvalidTaskOptionError, match="Give it to a method"):
        task_options(**{name: options[name]})(Mailer)


def test_every_documented_value_is_taken() -> None:
    """What the table of options calls valid is."""
    options: TaskOptions = {
        "queue": "mail",
        "routing_key": "mail.eu",
        "priority": 9,
        "countdown": timedelta(0),
        "eta": None,
        "expires": NOW,
        "time_limit": 5.5,
        "soft_time_limit": timedelta(seconds=5),
        "ignore_result": False,
        "compression": "gzip",
        "serializer": CelerySerializer.JSON,
        "retry": RetryPolicy(),
        "rate_limit": "1.5/h",
        "delivery": CeleryDelivery.AT_MOST_ONCE,
        "track_started": True,
        "seal": "require",
        "name": "mail",
        "aliases": ("old",),
    }
    assert own_options(decorate(**options)) == options
    assert set(options) == set(TaskOptions.__annotations__)
    nothing: Any = dict.fromkeys(TaskOptions.__annotations__.keys() - {"name", "aliases"})
    assert own_options(decorate(**nothing)) == nothing


def test_options_cannot_be_changed_and_are_nobody_else_s() -> None:
    """What one decorator gave, no other object gets and no code changes."""
    send = decorate(queue="mail")
    with pytest.raises(TypeError):
        own_options(send)["queue"] = "other"

    def other() -> None: ...

    vars(other).update(vars(send))  # as functools.wraps does
    task_options(priority=1)(other)
    assert own_options(send) == {"queue": "mail"}
    assert own_options(other) == {"queue": "mail", "priority": 1}


@task_options(queue="base", priority=1, countdown=5)
class Base:
    @task
    @task_options(queue="method", expires=60)
    def inherited(self) -> None: ...

    @task
    def overridden(self) -> None: ...

    @task_options(name="base.named", aliases=("old",))
    @task
    def named(self) -> None: ...


@task_options(priority=2, eta=NOW)
@TaskHandler()
class Heir(Base):
    @task_options(expires=None)
    def inherited(self) -> None: ...

    def overridden(self) -> None: ...


def test_layers_win_from_the_class_to_the_method_and_from_the_base_to_the_heir() -> None:
    """An override keeps the options that it does not repeat, with and without a decorator, and None takes back."""
    assert resolve_options(Heir, "inherited") == {"queue": "method", "priority": 2, "eta": NOW, "expires": None}
    assert resolve_options(Heir, "overridden") == {"queue": "base", "priority": 2, "eta": NOW}
    assert resolve_options(Base, "inherited") == {"queue": "method", "priority": 1, "countdown": 5, "expires": 60}
    assert own_options(Base) == {"queue": "base", "priority": 1, "countdown": 5}


def test_a_task_has_its_options_and_its_name() -> None:
    """The task's name on the wire is the explicit one, inherited too, and its aliases are further ones."""
    methods: dict[str, TaskMethod] = {method.attribute: method for method in find_task_methods(Heir)}
    assert methods["named"].name == "base.named"
    assert methods["named"].aliases == ("old",)
    assert methods["overridden"].name == f"{__name__}.Heir.overridden"
    assert methods["overridden"].aliases == ()
    assert methods["overridden"].options == resolve_options(Heir, "overridden")
    assert getattr_static(Heir, "overridden") is methods["overridden"].function


def test_the_decorators_stand_in_either_order() -> None:
    """Options above @task and below it are the same."""

    @TaskHandler()
    class Mailer:
        @task
        @task_options(queue="mail")
        def below(self) -> None: ...

        @task_options(queue="mail")
        @task
        def above(self) -> None: ...

    assert [method.options for method in find_task_methods(Mailer)] == [{"queue": "mail"}] * 2


@pytest.mark.parametrize("kind", [lambda function: function, staticmethod, classmethod])
def test_options_without_a_task_are_refused(kind: Any) -> None:
    """A forgotten @task shows at start-up, and not as a call that runs inline."""

    class Mailer:
        send = kind(decorate(queue="mail"))

    with pytest.raises(UnsupportedTaskMethodError, match=r"options of a task, and neither @task nor @schedule"):
        list(find_task_methods(Mailer))


ROBOT = AuthContext(subject=AuthSubject(id="robot"), issuer="test")
SOMEBODY = AuthContext(subject=AuthSubject(id="somebody"), issuer="test")


def test_options_of_schedules_merge_as_those_of_tasks() -> None:
    """The class's hold for all its schedules, a method's win, an override keeps them, None takes them back."""

    @schedule_options(run_as=ROBOT)
    class Base:
        @schedule(interval=timedelta(hours=1))
        def inherited(self) -> None: ...

        @task_options(queue="mail")
        @schedule_options(run_as=SOMEBODY)
        @schedule(interval=timedelta(hours=1))
        def own(self) -> None: ...

        @schedule(interval=timedelta(hours=1))
        @schedule_options(run_as=None)
        def taken_back(self) -> None: ...

    class Heir(Base):
        def own(self) -> None: ...

    found = {method.attribute: method.options for method in find_task_methods(Heir)}
    assert found == {
        "inherited": {"run_as": ROBOT},
        "own": {"run_as": SOMEBODY, "queue": "mail"},
        "taken_back": {"run_as": None},
    }


@pytest.mark.parametrize(
    "options", [{"run_as": "robot"}, {"run_as": AuthContext}, {"run_at": ROBOT}, {"queue": "mail"}]
)
def test_wrong_options_of_a_schedule_are_refused(options: Any) -> None:
    """The error says what would be right: an AuthContext, or the name of an option."""
    with pytest.raises(InvalidTaskOptionError, match=r"AuthContext\(|Options are run_as"):
        schedule_options(**options)(lambda self: None)


def test_options_of_a_schedule_without_one_are_refused() -> None:
    """A task that only callers dispatch has the caller's identity, and no principal."""

    class Mailer:
        @task
        @schedule_options(run_as=ROBOT)
        def send(self) -> None: ...

    with pytest.raises(UnsupportedTaskMethodError, match=r"@schedule_options, and no @schedule"):
        list(find_task_methods(Mailer))


def test_a_nested_class_with_options_is_no_method() -> None:
    """A class inside of a handler may have options of its own."""

    class Mailer:
        Inner = task_options(queue="mail")(type("Inner", (), {}))

    assert list(find_task_methods(Mailer)) == []


layers = st.dictionaries(st.sampled_from(["queue", "priority", "expires"]), st.none() | st.integers(1, 5))


@given(layers, layers, layers)
def test_merging_is_by_keys_and_in_order(first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]) -> None:
    """The last layer that has a key wins, None included; grouping makes no difference."""
    merged = merge_options(first, second, third)
    assert merged == first | second | third
    assert merged == merge_options(merge_options(first, second), third) == merge_options(first, second | third)


@pytest.mark.parametrize(
    ("lower", "upper", "merged"),
    [
        ({"countdown": 5}, {"eta": NOW}, {"eta": NOW}),
        ({"eta": NOW}, {"countdown": 5}, {"countdown": 5}),
        ({"countdown": 5}, {"eta": None}, {"countdown": 5, "eta": None}),
        ({"eta": NOW}, {"countdown": None}, {"eta": NOW, "countdown": None}),
    ],
)
def test_a_moment_takes_back_a_countdown(lower: dict[str, Any], upper: dict[str, Any], merged: dict[str, Any]) -> None:
    """Both say when a run may begin, so that a layer that says one does not contradict the other of a lower layer."""
    assert merge_options(lower, upper) == merged


@pytest.mark.parametrize(
    ("options", "option", "told"),
    [
        ({"delivery": "at_most_once"}, "delivery", "give it to @task_options"),
        ({"retry": RetryPolicy()}, "retry", "give it to @task_options"),
        ({"quue": "mail"}, "quue", "Did you mean queue?"),
        ({"serializer": "xml"}, "serializer", "json, pickle, yaml, msgpack"),
        ({"serializer": "pickle"}, "serializer", "SPAKKY_CELERY__ACCEPT_CONTENT"),
        ({"compression": "rar"}, "compression", "gzip"),
    ],
)
def test_what_a_call_cannot_have_is_refused(options: dict[str, Any], option: str, told: str) -> None:
    """A call has the options of messages, in formats that workers read."""
    with pytest.raises(InvalidTaskOptionError) as caught:
        check_call_options("shop.Mailer.write", options, ["json", "application/x-msgpack"])
    assert (caught.value.target, caught.value.option) == ("shop.Mailer.write", option)
    assert told in caught.value.expected


def test_every_message_option_is_one_of_a_call() -> None:
    """What a task can say for its messages, a call can say for its own."""
    nothing: Any = dict.fromkeys(MessageOptions.__annotations__)
    check_call_options("shop.Mailer.write", nothing, None)
    check_call_options("shop.Mailer.write", {"serializer": "msgpack", "compression": "gzip"}, ["json", "msgpack"])


def test_message_options_become_celery_s() -> None:
    """Durations become seconds; None of a limit is longer than any run, and other Nones are left to the settings."""
    options = {"countdown": timedelta(minutes=1), "expires": timedelta(hours=1), "serializer": CelerySerializer.JSON}
    assert to_publish_options(options) == {"countdown": 60.0, "expires": 3600.0, "serializer": "json"}
    assert type(to_publish_options(options)["serializer"]) is str
    assert to_publish_options({"expires": NOW, "countdown": 5, "eta": None}) == {"expires": NOW, "countdown": 5}
    assert to_publish_options({"queue": None, "priority": 0}) == {"priority": 0}
    assert to_publish_options({"time_limit": None, "soft_time_limit": 5}) == {
        "time_limit": TEN_YEARS,
        "soft_time_limit": 5,
    }
    assert to_publish_options({"retry": RetryPolicy(), "name": "x", "delivery": "at_most_once"}) == {}


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        ({}, {}),
        ({"queue": "mail", "priority": 5, "expires": 5}, {}),
        ({"rate_limit": "10/m"}, {"rate_limit": "10/m"}),
        ({"rate_limit": None}, {"rate_limit": 0}),
        ({"ignore_result": None, "track_started": False}, {"track_started": False}),
        ({"time_limit": None}, {"time_limit": TEN_YEARS}),
        ({"serializer": "msgpack", "compression": "gzip"}, {"serializer": "msgpack", "compression": "gzip"}),
        ({"delivery": None, "retry": None}, {}),
        (
            {"delivery": "at_most_once"},
            {"acks_late": False, "reject_on_worker_lost": False, "retry_on_worker_lost": False},
        ),
        (
            {"delivery": CeleryDelivery.AT_LEAST_ONCE},
            {"acks_late": True, "reject_on_worker_lost": True, "retry_on_worker_lost": True},
        ),
        (
            {"retry": RetryPolicy(max_retries=None, backoff=timedelta(seconds=2))},
            {"max_retries": None, "default_retry_delay": 2},
        ),
    ],
)
def test_worker_options_become_attributes_of_the_celery_task(
    options: dict[str, Any], attributes: dict[str, Any]
) -> None:
    """What a worker reads off its task is there; what was not said is left to the settings."""
    assert to_task_attributes(options) == attributes


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"backoff": -1}, "backoff"),
        ({"backoff": 700}, "backoff_max"),
        ({"backoff_max": "1"}, "backoff_max"),
        ({"jitter": 0.5}, "jitter"),
        ({"retry_on": "ValueError"}, "retry_on"),
        ({"give_up_on": (ValueError, KeyboardInterrupt)}, "give_up_on"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(fields: dict[str, Any], field: str) -> None:
    """A policy is checked when it is made."""
    with pytest.raises(InvalidTaskOptionError) as caught:
        RetryPolicy(**fields)
    assert (caught.value.target, caught.value.option) == ("RetryPolicy", field)


@given(
    st.integers(0, 10**6),
    st.floats(0, 1e6, allow_nan=False),
    st.floats(0, 1e6, allow_nan=False),
    st.booleans(),
)
def test_delays_grow_up_to_their_maximum(retries: int, backoff: float, more: float, jitter: bool) -> None:
    """No delay is above the maximum, below half of what it would be without jitter, or shorter than the one before."""
    policy = RetryPolicy(backoff=backoff, backoff_max=backoff + more, jitter=jitter)
    steady = RetryPolicy(backoff=backoff, backoff_max=backoff + more, jitter=False)
    delay, whole = policy.delay_s(retries), steady.delay_s(retries)
    assert whole / 2 <= delay <= whole <= backoff + more
    assert steady.delay_s(retries + 1) >= whole
    assert steady.delay_s(0) == backoff


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(), True),
        (ConnectionError(), True),
        (TimeoutError(), False),
        (ValueError(), False),
        (Ignore(), False),
        (Reject(), False),
        (Retry(), False),
        (TaskArgumentsError(), False),
        (AuthRequirementDeniedError(), False),
        (AuthContextNotFoundError(), False),
    ],
)
def test_what_is_worth_a_retry(error: Exception, expected: bool) -> None:
    """Only what retry_on has and give_up_on has not; never what a retry cannot change."""
    policy = RetryPolicy(retry_on=OSError, give_up_on=(TimeoutError,))
    assert policy.is_worth_retrying(error) is expected
    assert RetryPolicy(give_up_on=(TimeoutError, ValueError)).is_worth_retrying(error) is expected


def test_policies_are_values() -> None:
    """Any number of tasks can share one."""
    assert RetryPolicy(backoff=2) == RetryPolicy(backoff=2)
    assert hash(RetryPolicy()) == hash(RetryPolicy())
    with pytest.raises(AttributeError):
        RetryPolicy().backoff = 5  # type: ignore[misc]
