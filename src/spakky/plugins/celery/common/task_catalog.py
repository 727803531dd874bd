"""Owns which tasks one application has, and which Pods run them; registers nothing anywhere."""

from collections.abc import Iterator
from difflib import get_close_matches

from spakky.core.pod.annotations.pod import Pod

from spakky.plugins.celery.common.task_method import TaskMethod, find_task_methods
from spakky.plugins.celery.error import AmbiguousHandlerPodError, DuplicateTaskNameError, TaskNotRegisteredError

__all__ = ["TaskCatalog"]


@Pod()
class TaskCatalog:
    """The tasks of one application: one per application context, filled at start-up, read by every dispatch and run."""

    def __init__(self) -> None:
        self._methods: dict[str, TaskMethod] = {}
        self._names: dict[str, TaskMethod] = {}
        self._methods_of: dict[type, tuple[TaskMethod, ...]] = {}
        self._pods: dict[type, list[str]] = {}

    def __iter__(self) -> Iterator[TaskMethod]:
        return iter(list(self._methods.values()))

    def __contains__(self, method: TaskMethod) -> bool:
        known = self._methods.get(method.name)
        return known is not None and known.handler is method.handler

    def add(self, handler: type, pod_name: str) -> None:
        """Add a handler class's tasks, to be run on the Pod of this name too.

        Raises:
            DuplicateTaskNameError: If another class already has a task of the same name.
            UnsupportedTaskMethodError: If a decorated member cannot be a task.
        """
        methods = tuple(find_task_methods(handler))
        for method in methods:
            for name in (method.name, *method.aliases):
                known = self._names.setdefault(name, method)
                if (known.handler, known.attribute) != (handler, method.attribute):
                    raise DuplicateTaskNameError(name, known.location, method.location)
            self._methods.setdefault(method.name, method)
        self._methods_of[handler] = methods
        pods = self._pods.setdefault(handler, [])
        if pod_name not in pods:
            pods.append(pod_name)

    def contains_handler(self, handler: type) -> bool:
        """Whether this handler class was added."""
        return handler in self._pods

    def handlers(self) -> tuple[type, ...]:
        """The handler classes, in the order of registration."""
        return tuple(self._pods)

    def methods_of(self, handler: type) -> tuple[TaskMethod, ...]:
        """The tasks of one handler class."""
        return self._methods_of.get(handler, ())

    def pods_of(self, handler: type) -> tuple[str, ...]:
        """Names of the Pods of a handler class, in the order of registration."""
        return tuple(self._pods.get(handler, ()))

    def has_several_pods(self, handler: type) -> bool:
        """Whether a handler class alone does not say which Pod is meant."""
        return len(self._pods.get(handler, ())) > 1

    def pod_for(self, method: TaskMethod, named: object) -> str | None:
        """Name the Pod that a run is for: the one that the message names, or the only one, else None.

        Raises:
            AmbiguousHandlerPodError: If the message names a Pod that the handler does not have.
        """
        pods = self._pods.get(method.handler, ())
        if named is not None:
            if named not in pods:
                raise AmbiguousHandlerPodError(method.name, tuple(pods))
            return str(named)
        return pods[0] if len(pods) == 1 else None

    def check_registered(self, method: TaskMethod) -> None:
        """Raise TaskNotRegisteredError for a task that this application does not have."""
        if method not in self:
            raise TaskNotRegisteredError(method.name, tuple(get_close_matches(method.name, self._methods, cutoff=0.4)))
