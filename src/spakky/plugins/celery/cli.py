"""Owns the ``spakky-celery`` command: finds the application and hands over to Celery's own commands."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import signature

import click
from celery import Celery, maybe_patch_concurrency
from celery.bin.base import CLIContext
from celery.bin.worker import worker as worker_command
from celery.concurrency import ALIASES
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.common.celery_options import select_named_queues
from spakky.plugins.celery.common.constants import (
    ASYNCIO_POOL,
    DEFAULT_CONCURRENCY,
    DEFAULT_CONCURRENCY_SETTING,
)
from spakky.plugins.celery.common.green_threads import refuse_green_threads
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.dead_letters import DeadLetter, DeadLetters
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

Own commands, for tasks whose identity expired in the queue: dead-letters, reauthorize
Celery's commands: {commands}
`spakky-celery COMMAND --help` shows the options of one.
"""
_STARTED_BEFORE_FORK = """\
Warning: the application was started before the prefork pool forks: its services, threads and connections do not exist
in the children. Name an application that is not started, or a function that returns one.
"""
_DEFAULT_ATTRIBUTE = "app"
_PREFORK = "prefork"
_PROGRAM = "spakky-celery"
_WORKER = "worker"
_CELERYS_VARIABLES = ("APP", "BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "NO_COLOR", "SKIP_CHECKS")
"""What the command around Celery's commands has for its own options."""
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
        click.echo(_to_usage())
        return 0 if arguments else _EX_USAGE
    if arguments[0] == "--version":
        click.echo(f"{_PROGRAM} {version(_PROGRAM)} (celery {version('celery')})")
        return 0
    return _run(arguments[0], arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    if command != _WORKER and command not in _OWN_COMMANDS and command not in _celery_commands():
        click.echo(_to_usage(), err=True)
        click.echo(f"Error: {command!r} is not a command.", err=True)
        return _EX_USAGE
    if "--help" in arguments:
        if command in _OWN_COMMANDS:
            return _run_click(lambda: _OWN_COMMANDS[command].main(["--help"], command, standalone_mode=False))
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
    if command in _OWN_COMMANDS:
        if not isinstance(application, SpakkyApplication):
            raise InvalidApplicationTargetError(target, "it is a Celery app, and this needs a Spakky application")
        main_of = _OWN_COMMANDS[command].main
        return _run_click(lambda: main_of(options, command, standalone_mode=False, obj=application))
    if isinstance(application, Celery):
        return _run_celery(application, [command, *options])
    if not application.container.contains(Celery):
        raise InvalidApplicationTargetError(target, "it has no Celery Pod; call load_plugins() on it")
    if command == _WORKER:
        return _run_worker(application, options)
    return _run_celery(_find_celery(application), [command, *options])


def _celery_commands() -> Mapping[str, click.Command]:
    from celery.bin.celery import celery as celery_command  # noqa: PLC0415  # a worker does without

    commands: Mapping[str, click.Command] = celery_command.commands
    return commands


def _to_usage() -> str:
    return _USAGE.format(commands=", ".join(sorted(_celery_commands())))


def _run_worker(application: SpakkyApplication, options: list[str]) -> int:
    """Run a worker with the application started where tasks run: in this process, or in each prefork child."""
    context = application.application_context
    celery = _find_celery(application)
    pool = _choose_pool(celery, options)
    if _PREFORK in pool and not context.is_started:
        from spakky.plugins.celery.worker.lifecycle import PreforkLifecycle  # noqa: PLC0415  # workers only

        PreforkLifecycle(application, celery)
        return _run_worker_command(celery, options)
    if _PREFORK in pool:
        click.echo(_STARTED_BEFORE_FORK, err=True)
    from spakky.plugins.celery.worker.lasting_objects import freeze_when_ready  # noqa: PLC0415  # the same

    freeze_when_ready()
    if not context.is_started:
        application.start()
    try:
        celery = context.get(Celery)
        _choose_pool(celery, options)
        return _run_worker_command(celery, options)
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
    parser = worker_command.make_parser(click.Context(worker_command))
    try:
        parsed, _, _ = parser.parse_args(list(options))
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


def _run_worker_command(celery: Celery, options: list[str]) -> int:
    """Run Celery's worker without its other commands, one of which has a shell: 7 MiB that no worker needs."""
    if celery.user_options or any(os.environ.get(name) for name in _CELERYS_VARIABLES):
        return _run_celery(celery, [_WORKER, *options])
    celery.set_current()
    obj, name = CLIContext(app=celery, no_color=False, workdir=None), f"{_PROGRAM} {_WORKER}"
    return _run_click(lambda: worker_command.main(options, name, standalone_mode=False, obj=obj))


def _run_celery(celery: Celery, arguments: list[str]) -> int:
    # beat reads schedules back from its file without an app; Celery's own then ask the current one for its timezone.
    celery.set_current()
    return _run_click(lambda: celery.start(arguments))


def _run_click(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
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
    """Find an application's Celery app; of one that is not started, without building anything of it."""
    return _prepare(application).get(Celery)


def _prepare(application: SpakkyApplication) -> IApplicationContext:
    """Find a container with an application's Celery app and tasks; for one that is not started, without starting it.

    The Celery app of an application that is not started is made by a second container of the same definitions: a Pod
    that the first one builds before its start would miss its post-processors for ever.
    """
    context = application.application_context
    if context.is_started:
        return context
    definitions = ApplicationContext()
    for pod in context.pods.values():
        definitions.add(pod.target)
    CeleryPostProcessor().prepare(definitions)
    return definitions


_QUEUES = click.option("--queue", "queues", multiple=True, help="A queue they were on. Default: all of them.")


@click.command("dead-letters")
@_QUEUES
@click.pass_obj
def _list_dead_letters(application: SpakkyApplication, queues: tuple[str, ...]) -> int:
    """List the tasks whose identity expired in the queue, as their messages say."""
    letters = _find_dead_letters(_prepare(application), queues).find()
    for letter in letters:
        click.echo(_to_line(letter))
    click.echo(f"Dead letters: {len(letters)}")
    return 0


@click.command("reauthorize")
@_QUEUES
@click.option("--id", "ids", multiple=True, help="Id of a task, as dead-letters lists it.")
@click.option("--all", "is_all", is_flag=True, help="All of them.")
@click.option("--unsealed", is_flag=True, help="Believe messages of an application that seals none.")
@click.pass_obj
def _reauthorize(
    application: SpakkyApplication,
    queues: tuple[str, ...],
    ids: tuple[str, ...],
    *,
    is_all: bool,
    unsealed: bool,
) -> int:
    """Send dead letters to their queues once more, with the same identity signed anew. Starts the application."""
    if bool(ids) is is_all:
        problem = "Say which: --id ID, once for each, or --all."
        raise click.UsageError(problem)
    context = application.application_context
    if not context.is_started:
        application.start()
    try:
        found = _find_dead_letters(context, queues).reauthorize(context, ids or None, accept_unsealed=unsealed)
    finally:
        application.stop()
    for letter in found:
        click.echo(f"{'left' if letter.problem else 'sent'}  {_to_line(letter)}")
    missing = sorted(set(ids) - {letter.task_id for letter in found})
    for task_id in missing:
        click.echo(f"none  {task_id}: there is no such dead letter", err=True)
    return 1 if missing or any(letter.problem for letter in found) else 0


def _find_dead_letters(context: IApplicationContext, queues: tuple[str, ...]) -> DeadLetters:
    celery = context.get(Celery)
    select_named_queues(celery, context.get(TaskCatalog))
    return DeadLetters(celery, queues or tuple(celery.amqp.queues.consume_from))


def _to_line(letter: DeadLetter) -> str:
    """Show what a message says of itself, without the control characters that somebody may have put there."""
    text = f"{letter.task_id}  {letter.task}  subject {letter.subject}  expired {letter.expired}  queue {letter.queue}"
    shown = f"{text}  {letter.problem}" if letter.problem else text
    return "".join(character if character.isprintable() else "?" for character in shown)


_OWN_COMMANDS = {command.name: command for command in (_list_dead_letters, _reauthorize)}
