"""Which tasks an application has, what they are called, and when one is refused."""

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, current_app
from spakky.auth import IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier, IPermissionChecker
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.annotations.primary import Primary
from spakky.core.pod.interfaces.post_processor import IPostProcessor
from spakky.core.service.interfaces.service import IService
from spakky.task import DuplicateTaskError, TaskHandler, task

from spakky.plugins.celery.common.constants import HANDLER_POD_HEADER
from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.error import (
    AmbiguousCeleryPodError,
    AmbiguousHandlerPodError,
    DuplicateTaskNameError,
    InvalidCeleryConfigError,
    InvalidScheduleRouteError,
    TaskNotRegisteredError,
    UnsupportedTaskMethodError,
)
from support import handlers, probe
from support.fixtures import celery_of
from support.probe import build


@pytest.fixture
def start() -> Iterator[Callable[..., SpakkyApplication]]:
    """Start applications, and stop them at the end."""
    started: list[SpakkyApplication] = []

    def start_application(*pods: Any) -> SpakkyApplication:
        started.append(build(*pods).start())
        return started[-1]

    yield start_application
    for app in started:
        if app.application_context.is_started:
            app.stop()


def own_tasks(celery: Celery) -> set[str]:
    return {name for name in celery.tasks if not name.startswith("celery.")}


def sent(app: SpakkyApplication) -> list[dict[str, Any]]:
    """Take all messages from the application's queue."""
    messages = []
    celery = celery_of(app)
    with celery.connection_for_read() as connection:
        queue = celery.amqp.queues[celery.conf.task_default_queue](connection.default_channel)
        queue.declare()
        while (message := queue.get(no_ack=True)) is not None:
            messages.append({"headers": message.headers, "body": message.decode()})
    return messages


def test_every_kind_of_handler_is_registered(start: Callable[..., SpakkyApplication]) -> None:
    """Inherited, overridden, generic, interface-only, lazy, scoped, factory-made: each task is registered once."""
    app = start(*handlers.ALL)
    assert own_tasks(celery_of(app)) == {
        f"support.handlers.{name}"
        for name in (
            "ContextHandler.same_in_one_run",
            "Decorated.add",
            "Hidden.reveal",
            "Inherits.clean",
            "Inherits.name_class",
            "LazyHandler.run",
            "Numbers.echo",
            "Overrides.clean",
            "Overrides.name_class",
            "PrototypeHandler.identity",
            "Reports.render",
            "Tagged.read_tag",
            "Tagged.scheduled",
            "Words.echo",
        )
    }
    assert set(celery_of(app).conf.beat_schedule) == {
        "support.handlers.Inherits.clean",
        "support.handlers.Overrides.clean",
        "support.handlers.Tagged.scheduled[first_tagged]",
        "support.handlers.Tagged.scheduled[second_tagged]",
    }


def test_every_kind_of_handler_dispatches_under_its_own_name(start: Callable[..., SpakkyApplication]) -> None:
    """A call on any of them puts the handler's own task name on the wire, and runs nothing here."""
    app = start(*handlers.ALL)
    get = app.container.get
    get(handlers.Inherits).name_class()
    get(handlers.Overrides).name_class()
    asyncio.run(get(handlers.Words).echo("x"))
    get(handlers.Reports).render()
    get(handlers.LazyHandler).run()
    get(handlers.PrototypeHandler).identity()
    get(handlers.ContextHandler).same_in_one_run()
    get(handlers.Decorated).add(1, second=2)
    get(handlers.IHidden).reveal()  # type: ignore[type-abstract]
    assert [message["headers"]["task"].removeprefix("support.handlers.") for message in sent(app)] == [
        "Inherits.name_class",
        "Overrides.name_class",
        "Words.echo",
        "Reports.render",
        "LazyHandler.run",
        "PrototypeHandler.identity",
        "ContextHandler.same_in_one_run",
        "Decorated.add",
        "Hidden.reveal",
    ]


def test_the_called_pod_is_named_where_there_are_several(start: Callable[..., SpakkyApplication]) -> None:
    """With two Pods of one handler class the message names the one that was called; with one it names none."""
    app = start(handlers.first_tagged, handlers.second_tagged, handlers.Inherits)
    app.container.get(handlers.Tagged, "second_tagged").read_tag()
    app.container.get(handlers.Tagged, "first_tagged").read_tag()
    app.container.get(handlers.Inherits).name_class()
    assert [message["headers"].get(HANDLER_POD_HEADER) for message in sent(app)] == [
        "second_tagged",
        "first_tagged",
        None,
    ]


def test_runs_go_to_the_named_pod(start: Callable[..., SpakkyApplication]) -> None:
    """A run is on the Pod that the message names; without a name, and no primary one, it is refused."""
    app = start(handlers.first_tagged, handlers.second_tagged)
    body = celery_of(app).tasks["support.handlers.Tagged.read_tag"]
    for tag in ("first", "second"):
        assert body.apply(headers={HANDLER_POD_HEADER: f"{tag}_tagged"}).get() == tag
    with pytest.raises(AmbiguousHandlerPodError, match="first_tagged, second_tagged"):
        body.apply().get()
    with pytest.raises(AmbiguousHandlerPodError):
        body.apply(headers={HANDLER_POD_HEADER: "celery_app"}).get()


def test_primary_pod_runs_unnamed_messages(start: Callable[..., SpakkyApplication]) -> None:
    """A message of another producer runs on the handler's @Primary Pod."""

    @Primary()  # type: ignore[arg-type]
    @Pod(name="primary_tagged")
    def primary_tagged() -> handlers.Tagged:
        return handlers.Tagged("primary")

    app = start(handlers.first_tagged, primary_tagged)
    assert celery_of(app).tasks["support.handlers.Tagged.read_tag"].apply().get() == "primary"


def test_prototype_pods_of_two_names_cannot_be_told_apart(start: Callable[..., SpakkyApplication]) -> None:
    """A call on a Pod that cannot be found again is refused at the call site, naming the Pods."""

    @Pod(name="fleeting", scope=Pod.Scope.PROTOTYPE)
    def fleeting() -> handlers.Tagged:
        return handlers.Tagged("fleeting")

    app = start(handlers.first_tagged, fleeting)
    with pytest.raises(AmbiguousHandlerPodError, match="fleeting"):
        app.container.get(handlers.Tagged, "fleeting").read_tag()
    assert sent(app) == []


def no_self() -> None: ...


def generator(self: Any) -> Iterator[int]:
    yield 1


def keyword_only(self: Any, *, method: str) -> None: ...


class NoFunction:
    def __call__(self) -> None: ...


UNSUPPORTED: list[tuple[Any, str]] = [
    (task(classmethod(lambda _: None)), "@classmethod"),  # type: ignore[arg-type]
    (classmethod(task(lambda _: None)), "@classmethod"),
    (staticmethod(task(lambda: None)), "@staticmethod"),
    (task(NoFunction()), "NoFunction"),
    (task(generator), "generator"),
    (task(keyword_only), "'method'"),
    (task(no_self), "no self"),
]


@pytest.mark.parametrize(("member", "reason"), UNSUPPORTED)
def test_unsupported_methods_are_refused_at_start(member: Any, reason: str) -> None:
    """What would run inline, or could not run, is refused at start-up, naming handler and method and what to write."""
    handler = TaskHandler()(type("Refused", (), {"member": member}))
    with pytest.raises(UnsupportedTaskMethodError, match=r"test_identity\.Refused\.member") as caught:
        build(handler).start()
    assert reason in caught.value.reason
    assert caught.value.instead


def test_schedule_with_required_parameters_is_refused() -> None:
    """beat calls without arguments, so a scheduled method may not need any."""
    from datetime import timedelta

    from spakky.task import schedule

    @TaskHandler()
    class Needy:
        @schedule(interval=timedelta(seconds=1))
        def run(self, amount: int, unit: str = "EUR") -> None: ...

    with pytest.raises(InvalidScheduleRouteError, match=r"Needy\.run has parameters = \['amount'\]"):
        build(Needy).start()


def test_duplicate_names_are_refused_naming_both() -> None:
    """Two classes with one qualified name are a duplicate, and the error shows where each of them is."""

    def make() -> type:
        @TaskHandler(name="unused")
        class Twin:
            @task
            def run(self) -> None: ...

        return Twin

    first, second = make(), make()

    @Pod(name="one")
    def one() -> first: ...  # type: ignore[valid-type]

    @Pod(name="two")
    def two() -> second: ...  # type: ignore[valid-type]

    with pytest.raises(DuplicateTaskNameError, match=r"Twin\.run \(line \d+\) and .*Twin\.run \(line \d+\)") as caught:
        build(one, two).start()
    assert isinstance(caught.value, DuplicateTaskError)


def test_plain_celery_task_of_the_same_name_is_refused() -> None:
    """A task that the user registered with Celery itself under a handler's name is not silently replaced."""

    @Pod()
    class Registers(CeleryCustomizer):
        def customize(self, celery: Celery) -> None:
            celery.task(no_self, name="support.handlers.Inherits.name_class", shared=False)

    with pytest.raises(DuplicateTaskNameError, match="plain Celery task"):
        build(handlers.Inherits, Registers).start()


def test_tasks_that_no_worker_knows_are_refused(start: Callable[..., SpakkyApplication]) -> None:
    """A @task method of a Pod that is no @TaskHandler, and one that was not added, send no message."""

    @Pod()
    class NoHandler:
        @task
        def run(self) -> None: ...

    app = start(NoHandler, handlers.Inherits)
    with pytest.raises(TaskNotRegisteredError, match=r"NoHandler\.run"):
        app.container.get(NoHandler).run()
    from spakky.plugins.celery.dispatch import TaskDispatcher

    with pytest.raises(TaskNotRegisteredError, match=r"Overrides\.name_class"):
        app.container.get(TaskDispatcher).dispatch(handlers.Overrides().name_class)
    with pytest.raises(TaskNotRegisteredError, match="no_self"):
        app.container.get(TaskDispatcher).dispatch(no_self)
    assert sent(app) == []


@Pod()
class Signer(IAuthContextSnapshotSigner):
    def __init__(self, handler: handlers.Inherits) -> None:
        self.handler = handler

    def sign_snapshot(self, request: Any) -> Any: ...


@Pod()
class Verifier(IAuthContextSnapshotVerifier):
    def __init__(self, signer: Signer) -> None:
        self.handler = signer.handler

    def verify_snapshot(self, snapshot_envelope: str, invocation: Any) -> Any: ...


@Pod()
class Checker(IPermissionChecker):
    def __init__(self, handler: handlers.Inherits) -> None:
        self.handler = handler

    def check_permission(self, request: Any) -> Any: ...


@Pod()
class Customizer(CeleryCustomizer):
    def __init__(self, handler: handlers.Inherits) -> None:
        self.handler = handler

    def customize(self, celery: Celery) -> None: ...


@Pod()
class Processor(IPostProcessor):
    def __init__(self, handler: handlers.Inherits) -> None:
        self.handler = handler

    def post_process(self, pod: object) -> object:
        return pod


@Pod(name="own_celery")
def own_celery(handler: handlers.Inherits) -> Celery:
    celery = Celery("own", broker="memory://", set_as_current=False)
    celery.handler = handler
    return celery


@pytest.mark.parametrize("pod", [Signer, Verifier, Checker, Customizer, Processor, own_celery])
def test_handlers_injected_into_what_the_plugin_needs(pod: Any, start: Callable[..., SpakkyApplication]) -> None:
    """A handler that something the plugin itself needs depends on is registered, and its calls are dispatched."""
    app = start(pod, *([Signer] if pod is Verifier else []), handlers.Inherits)
    assert "support.handlers.Inherits.name_class" in own_tasks(celery_of(app))
    holder = app.container.get(Celery if pod is own_celery else pod)
    holder.handler.name_class()
    app.container.get(handlers.Inherits).name_class()
    assert len(sent(app)) == 2


def test_two_applications_at_once(start: Callable[..., SpakkyApplication]) -> None:
    """Two applications in one process each have their own tasks; other Celery apps, and current_app, have none."""
    before = current_app._get_current_object()
    first, second = start(handlers.Inherits), start(handlers.Inherits, handlers.Reports)
    bystander = Celery("bystander", broker="memory://", set_as_current=False)
    assert celery_of(first) is not celery_of(second)
    assert own_tasks(celery_of(first)) < own_tasks(celery_of(second))
    assert own_tasks(bystander) == set()
    assert bystander.conf.beat_schedule == {}
    assert current_app._get_current_object() is before
    name = "support.handlers.Inherits.name_class"
    assert celery_of(first).tasks[name].apply().get() == "Inherits"
    first.stop()
    assert celery_of(second).tasks[name].apply().get() == "Inherits"


def test_each_application_runs_its_own_pods(start: Callable[..., SpakkyApplication]) -> None:
    """One handler class in two applications at once: a run is on the Pod of its own application."""
    first, second = start(handlers.first_tagged), start(handlers.second_tagged)
    for _ in range(2):
        for app, tag in ((first, "first"), (second, "second")):
            assert celery_of(app).tasks["support.handlers.Tagged.read_tag"].apply().get() == tag


def test_calls_while_the_application_starts_are_dispatched(start: Callable[..., SpakkyApplication]) -> None:
    """A call in a Pod's constructor, and one in a service's start, put a message on the broker and run nothing."""

    @Pod()
    class Impatient(IService):
        def __init__(self, handler: handlers.Inherits, lazy: handlers.LazyHandler) -> None:
            self.results: list[Any] = [handler.name_class(), lazy.run()]
            self._handler = handler

        def set_stop_event(self, stop_event: threading.Event) -> None: ...

        def start(self) -> None:
            self.results.append(self._handler.name_class())

        def stop(self) -> None: ...

    app = start(Impatient, handlers.LazyHandler, handlers.Inherits)
    assert {type(result).__name__ for result in app.container.get(Impatient).results} == {"CeleryTaskResult"}
    assert [message["headers"]["task"].removeprefix("support.handlers.") for message in sent(app)] == [
        "Inherits.name_class",
        "LazyHandler.run",
        "Inherits.name_class",
    ]


@pytest.mark.parametrize("moment", ["before the start", "after the start", "entry by entry"])
def test_the_users_own_schedule_is_merged(moment: str, start: Callable[..., SpakkyApplication]) -> None:
    """The user's entries and ours are both there, whichever came first; stop() takes ours and leaves the user's."""
    mine = {"task": "celery.ping", "schedule": 60.0}

    @Pod()
    class Schedules(CeleryCustomizer):
        def customize(self, celery: Celery) -> None:
            if moment == "before the start":
                celery.conf.beat_schedule = {"mine": mine}

    app = start(Schedules, handlers.Inherits)
    celery = celery_of(app)
    if moment == "after the start":
        celery.conf.beat_schedule = {"mine": mine}
    if moment == "entry by entry":
        celery.conf.beat_schedule["mine"] = mine
    celery.loader.import_default_modules()  # as worker and beat do first of all
    assert set(celery.conf.beat_schedule) == {"mine", "support.handlers.Inherits.clean"}
    app.stop()
    assert celery.conf.beat_schedule == {"mine": mine}


def test_stop_takes_everything_back(start: Callable[..., SpakkyApplication]) -> None:
    """After stop() no task, beat entry, publishing thread or connection of the application is left."""
    before = set(threading.enumerate())
    app = start(probe.Greeter, probe.Calls, probe.Clock)
    celery = celery_of(app)
    app.container.get(probe.Calls).greet("Ada")
    app.stop()
    assert own_tasks(celery) == set()
    assert celery.conf.beat_schedule == {}
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_one_celery_app_for_two_applications_in_turn() -> None:
    """A Celery app that outlives an application takes the next one's tasks, bound to the next one's container."""
    shared = Celery("shared", broker="memory://", backend="cache+memory://", set_as_current=False)

    @Pod(name="shared_celery")
    def shared_celery() -> Celery:
        return shared

    name = "support.handlers.Tagged.read_tag"
    for tag in ("first", "second"):
        app = build(shared_celery, getattr(handlers, f"{tag}_tagged")).start()
        assert shared.tasks[name].apply().get() == tag
        app.stop()
        assert name not in shared.tasks


def test_users_celery_is_respected_after_load_plugins(
    start: Callable[..., SpakkyApplication],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Celery Pod that is added after the plugin wins, and the plugin's own settings are not even read."""
    monkeypatch.delenv("SPAKKY_CELERY__BROKER_URL")
    app = start(own_celery, handlers.Inherits)
    assert celery_of(app).main == "own"


def test_users_celery_is_respected_before_load_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Celery Pod that is added before the plugin is the only one."""
    monkeypatch.delenv("SPAKKY_CELERY__BROKER_URL")
    app = SpakkyApplication(ApplicationContext()).add(own_celery).load_plugins(include=set(probe.PLUGINS))
    app.add(handlers.Inherits).start()
    try:
        assert celery_of(app).main == "own"
        assert not app.container.contains(Celery, "celery_app")
    finally:
        app.stop()


def test_two_celery_pods_are_refused() -> None:
    """With two Celery Pods of the application's own, start-up names both and says what to do."""

    @Pod(name="other_celery")
    def other_celery() -> Celery:
        return Celery("other", broker="memory://", set_as_current=False)

    with pytest.raises(AmbiguousCeleryPodError, match=r"other_celery, own_celery\.\n.*@Primary"):
        build(own_celery, other_celery, handlers.Inherits).start()


def test_missing_broker_url_is_a_start_up_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a broker URL the application does not start."""
    monkeypatch.delenv("SPAKKY_CELERY__BROKER_URL")
    with pytest.raises(InvalidCeleryConfigError, match="SPAKKY_CELERY__BROKER_URL"):
        build(handlers.Inherits).start()


def test_customizers_get_the_configured_app_before_it_is_finalized(start: Callable[..., SpakkyApplication]) -> None:
    """All customizers run, by Pod name, on an app that has its settings and is not finalized; their changes hold."""
    seen: list[tuple[str, str, bool]] = []

    def make(name: str) -> type:
        @Pod(name=name)
        class Named(CeleryCustomizer):
            def customize(self, celery: Celery) -> None:
                seen.append((name, celery.conf.task_default_queue, celery.finalized))
                celery.conf.task_routes = {"*": {"queue": name}}

        return Named

    app = start(make("b_customizer"), make("a_customizer"), handlers.Inherits)
    queue = os.environ["SPAKKY_CELERY__APP_NAME"]
    assert seen == [("a_customizer", queue, False), ("b_customizer", queue, False)]
    assert celery_of(app).conf.task_routes == {"*": {"queue": "b_customizer"}}


@pytest.mark.long
def test_no_growth_over_20000_runs(start: Callable[..., SpakkyApplication]) -> None:
    """Prototype and context handlers, sync and async tasks: 20,000 runs leave no more objects than 2,000."""
    app = start(*handlers.ALL)
    tasks = celery_of(app).tasks
    bodies = [
        tasks[f"support.handlers.{name}"]
        for name in ("PrototypeHandler.identity", "ContextHandler.same_in_one_run", "LazyHandler.run")
    ]

    def run(count: int) -> int:
        for _ in range(count // 4):
            for body in bodies:
                body()
            tasks["support.handlers.Words.echo"]("x")
        gc.collect()
        return len(gc.get_objects())

    settled = run(2_000)
    assert run(20_000) - settled < 500
