"""Owns the ``spakky-celery`` command: finds the application and hands over to Celery's own commands."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import signature

import click
from celery import Celery, maybe_patch_concurrency
from celery.bin.celery import celery as celery_command
from celery.concurrency import ALIASES
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext

from spakky.plugins.celery.common.constants import (
    ASYNCIO_POOL,
    DEFAULT_CONCURRENCY,
    DEFAULT_CONCURRENCY_SETTING,
)
from spakky.plugins.celery.common.green_threads import refuse_green_threads
from spakky.plugins.celery.error import (
    AbstractSpakkyCeleryError,
    InvalidApplicationTargetError,
)
from spakky.plugins.celery.post_processor import CeleryPostProcessor

__all__ = ["find_application", "main"]

_USAGE = """\
Usage: spakky-celery COMMAND MODULE:APP [OPTIONS]

  Runs a Celery command for a Spakky application.

  MODULE:APP names a SpakkyApplication (started or not), a function without
  arguments that returns one, or a Celery app. OPTIONS are Celery's own.

Examples:
  spakky-celery worker pkg.main:app --concurrency 4
  spakky-celery beat pkg.main:app
  spakky-celery inspect pkg.main:app active

Celery's commands: {commands}
`spakky-celery COMMAND --help` shows the options of one.
"""
_STARTED_BEFORE_FORK = """\
Warning: the application was started before the prefork pool forks: its services, threads and connections do not exist
in the children. Name an application that is not started, or a function that returns one.
"""
_DEFAULT_ATTRIBUTE = "app"
_PREFORK = "prefork"
_EX_USAGE = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None for the process's own.

    Returns:
        The exit code: Celery's own, 64 for a command line that cannot be used, 1 for an application that cannot.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help"}:
        click.echo(_USAGE.format(commands=", ".join(sorted(celery_command.commands))))
        return 0 if arguments else _EX_USAGE
    if arguments[0] == "--version":
        click.echo(f"spakky-celery {version('spakky-celery')} (celery {version('celery')})")
        return 0
    return _run(arguments[0], arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    if command not in celery_command.commands:
        click.echo(_USAGE.format(commands=", ".join(sorted(celery_command.commands))), err=True)
        click.echo(f"Error: {command!r} is not a command of Celery's.", err=True)
        return _EX_USAGE
    if "--help" in arguments:
        return _run_celery(Celery(set_as_current=False), [command, "--help"])
    if not arguments or arguments[0].startswith("-"):
        click.echo(f"Error: name the application: spakky-celery {command} MODULE:APP [OPTIONS]", err=True)
        return _EX_USAGE
    maybe_patch_concurrency(["celery", command, *arguments[1:]])
    try:
        return _run_with(arguments[0], command, arguments[1:])
    except AbstractSpakkyCeleryError as error:
        click.echo(f"Error: {error}", err=True)
        return 1


def _run_with(target: str, command: str, options: list[str]) -> int:
    application = find_application(target)
    if isinstance(application, Celery):
        return _run_celery(application, [command, *options])
    if not application.container.contains(Celery):
        raise InvalidApplicationTargetError(target, "it has no Celery Pod; call load_plugins() on it")
    if command == "worker":
        return _run_worker(application, options)
    return _run_celery(_find_celery(application), [command, *options])


def _run_worker(application: SpakkyApplication, options: list[str]) -> int:
    """Run a worker with the application started where tasks run: in this process, or in each prefork child."""
    context = application.application_context
    celery = _find_celery(application)
    pool = _choose_pool(celery, options)
    if _PREFORK in pool and not context.is_started:
        from spakky.plugins.celery.worker.lifecycle import PreforkLifecycle  # noqa: PLC0415  # workers only

        PreforkLifecycle(application, celery)
        return _run_celery(celery, ["worker", *options])
    if _PREFORK in pool:
        click.echo(_STARTED_BEFORE_FORK, err=True)
    if not context.is_started:
        application.start()
    try:
        celery = context.get(Celery)
        _choose_pool(celery, options)
        return _run_celery(celery, ["worker", *options])
    finally:
        if context.is_started:
            application.stop()


def _choose_pool(celery: Celery, options: list[str]) -> str:
    """Set the worker's pool: the option, then the app's own setting, then the plugin's pool.

    Returns:
        The import path of the pool.

    Raises:
        UnsupportedWorkerOptionError: If ``async def`` tasks cannot run in it.
    """
    command = celery_command.commands["worker"]
    try:
        parsed, _, _ = command.make_parser(click.Context(command)).parse_args(list(options))
    except click.UsageError:
        return _PREFORK  # Celery's command is about to say what is wrong: nothing may be started for it
    settings = celery.conf
    chosen = settings.table(with_defaults=False)
    if "pool" in parsed:
        # Celery's command takes --pool prefork for no choice, and so the setting instead.
        settings.worker_pool = parsed["pool"]
        if chosen.get(DEFAULT_CONCURRENCY_SETTING):
            settings.worker_concurrency = None
    elif not chosen.get("worker_pool"):
        settings.worker_pool = ASYNCIO_POOL
        settings.worker_concurrency = chosen.get("worker_concurrency") or DEFAULT_CONCURRENCY
    pool = str(ALIASES.get(settings.worker_pool, settings.worker_pool))
    refuse_green_threads(celery, pool)
    return pool


def _run_celery(celery: Celery, arguments: list[str]) -> int:
    # beat reads schedules back from its file without an app; Celery's own then ask the current one for its timezone.
    celery.set_current()
    try:
        return celery.start(arguments) or 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 1


def find_application(target: str) -> SpakkyApplication | Celery:
    """Import what ``module:attribute`` names, from the current directory too; call it if it is a factory.

    Raises:
        InvalidApplicationTargetError: If there is no such module or attribute, or it is no application.
    """
    module_name, _, attribute = target.partition(":")
    found = _import_attribute(target, module_name, attribute or _DEFAULT_ATTRIBUTE)
    if not isinstance(found, SpakkyApplication | Celery | type) and callable(found):
        try:
            signature(found).bind()
        except TypeError:
            raise InvalidApplicationTargetError(target, f"it takes arguments: {signature(found)}") from None
        found = found()
    if not isinstance(found, SpakkyApplication | Celery):
        raise InvalidApplicationTargetError(target, f"it is a {type(found).__name__}")
    return found


def _import_attribute(target: str, module_name: str, attribute: str) -> object:
    if os.getcwd() not in sys.path:  # noqa: PTH109  # sys.path holds strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109  # the same
    if not all(module_name.split(".")):
        raise InvalidApplicationTargetError(target, f"{module_name!r} is no module name")
    try:
        found: object = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the application itself imports is missing
        raise InvalidApplicationTargetError(target, f"there is no module {error.name!r}") from None
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise InvalidApplicationTargetError(target, f"{module_name} has no attribute {attribute!r}")
        found = getattr(found, name)
    return found


def _find_celery(application: SpakkyApplication) -> Celery:
    """Find an application's Celery app; of one that is not started, without building anything of it.

    The Celery app of an application that is not started is made by a second container of the same definitions: a Pod
    that the first one builds before its start would miss its post-processors for ever.
    """
    context = application.application_context
    if context.is_started:
        return context.get(Celery)
    definitions = ApplicationContext()
    for pod in context.pods.values():
        definitions.add(pod.target)
    return CeleryPostProcessor().prepare(definitions)
