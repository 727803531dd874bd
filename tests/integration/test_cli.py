"""The spakky-celery command, up to where Celery's own takes over."""

import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from kombu import Connection
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.cli import find_application, main
from spakky.plugins.celery.error import InvalidApplicationTargetError
from support import probe
from support.processes import SPAKKY_CELERY, make_environment

TARGET = "support.probe:create_app"


@pytest.mark.parametrize(("arguments", "code"), [([], 64), (["--help"], 0)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments, and with --help, the command shows how it is used and what commands there are."""
    assert main(arguments) == code
    assert "spakky-celery COMMAND MODULE:APP" in (shown := capsys.readouterr().out)
    assert "worker" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version names both packages."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("spakky-celery ")


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """COMMAND --help shows Celery's own options, with or without an application."""
    assert main(["worker", "--help"]) == 0
    assert "--concurrency" in capsys.readouterr().out
    assert main(["worker", TARGET, "--help"]) == 0
    assert "--concurrency" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that Celery does not have is named, with those that it has."""
    assert main(["wroker", TARGET]) == 64
    shown = capsys.readouterr()
    assert "'wroker' is not a command" in shown.err
    assert "beat, call, control" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("arguments", [["worker"], ["worker", "--loglevel", "INFO"]])
def test_missing_application(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without an application the command says where it goes."""
    assert main(arguments) == 64
    assert "spakky-celery worker MODULE:APP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("support.nowhere:app", "no module 'support.nowhere'"),
        ("nowhere:app", "no module 'nowhere'"),
        ("support.probe:nothing", "no attribute 'nothing'"),
        ("support.probe", "no attribute 'app'"),
        ("support.starting:not_an_application", "it is a int"),
        ("support.starting:Holder", "it is a type"),
        ("support.starting:create_with_parameter", "it takes arguments"),
        ("support.starting:create_without_plugin", "no Celery Pod"),
        (":app", "no module name"),
        ("..x:app", "no module name"),
        ("support/probe.py:app", "no module 'support/probe'"),
        ("support.probe.deeper:app", "no module 'support.probe.deeper'"),
        ("support.starting:Holder.nothing", "no attribute 'Holder.nothing'"),
    ],
)
def test_targets_that_are_no_application(target: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no application is refused, naming what was found and what would be one."""
    assert main(["inspect", target, "ping"]) == 1
    shown = capsys.readouterr().err
    assert reason in shown
    assert repr(target) in shown
    assert "Name a SpakkyApplication, a function" in shown


def test_targets_that_are_one() -> None:
    """An application, a factory, also below an attribute, and a Celery app are found."""
    assert isinstance(find_application(TARGET), SpakkyApplication)
    assert isinstance(find_application("support.starting:Holder.create"), SpakkyApplication)
    found = find_application("support.starting:create_celery")
    assert isinstance(found, Celery)
    assert "support.probe.Calls.greet" in found.tasks


def test_modules_in_the_current_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module beside the user is found, as Celery's own command finds it."""
    (tmp_path / "beside.py").write_text("from support.probe import create_app as app\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(find_application("beside"), SpakkyApplication)


@pytest.mark.parametrize(
    ("module", "text", "error"),
    [
        ("failing", "import a_library_that_is_missing", ModuleNotFoundError),
        ("lib_shop", "import lib", ModuleNotFoundError),
        ("bundle.main", "import bundle.missing", ModuleNotFoundError),
        ("valueless", "raise ValueError('of the user')", ValueError),
        ("typeless", "raise TypeError('of the user')", TypeError),
        ("attributeless", "import sys\nsys.nothing", AttributeError),
    ],
)
def test_errors_inside_the_users_module_stay(
    module: str,
    text: str,
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the user's module cannot be imported, its own error is what is shown, with where it was raised.

    Also when the name of what it misses is how its own name begins.
    """
    path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(error) as caught:
        main(["report", f"{module}:app"])
    assert str(path) in {str(entry.path) for entry in caught.traceback}
    with pytest.raises(InvalidApplicationTargetError):
        find_application(f"not_{module}:app")


def test_errors_of_a_factory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a factory raises is shown as it is, whatever its class."""

    def create() -> SpakkyApplication:
        message = "of the factory"
        raise TypeError(message)

    monkeypatch.setattr(probe, "create_app", create)
    with pytest.raises(TypeError, match="of the factory"):
        main(["report", TARGET])


def test_a_factory_may_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that can be called without arguments is a factory, whatever else it takes."""
    create = probe.create_app
    monkeypatch.setattr(probe, "create_app", lambda *_args, **_options: create())
    assert isinstance(find_application(TARGET), SpakkyApplication)
    monkeypatch.setattr(probe, "create_app", lambda name="app", *, debug=False: create())
    assert isinstance(find_application(TARGET), SpakkyApplication)


@pytest.mark.parametrize(
    "arguments",
    [
        ["worker", TARGET, "--pool", "solo"],
        ["worker", TARGET, "--pool", "prefork"],
        ["beat", TARGET],
        ["inspect", TARGET, "ping"],
    ],
    ids=" ".join,
)
def test_configuration_errors_are_shown_without_a_traceback(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A setting that is missing is shown as our own text, by every command."""
    monkeypatch.delenv("SPAKKY_CELERY__BROKER_URL")
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("Error: SPAKKY_CELERY__BROKER_URL")


@pytest.mark.parametrize("pool", ["solo", "prefork"])
def test_unknown_options_are_celerys_to_refuse(pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that Celery does not have is refused by Celery, and nothing was started for it."""
    assert main(["worker", TARGET, "--pool", pool, "--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_green_threads_are_refused_for_async_tasks(
    pool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They run no event loop; the error names the tasks."""
    monkeypatch.setenv("SPAKKY_CELERY__WORKER_POOL", pool)
    assert main(["worker", "support.probe:create_app"]) == 1
    said = capsys.readouterr().err
    assert "no event loop" in said
    assert "support.probe.Calls.greet_async" in said


@pytest.mark.parametrize("kind", ["factory", "not started", "started", "celery app"])
def test_commands_run_for_every_kind_of_target(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Celery's other commands run on the Celery app of whatever was named: report shows its settings and tasks."""
    monkeypatch.setenv("SPAKKY_CELERY__APP_NAME", "app-under-test")
    monkeypatch.setenv("PROBE_LOG", str(tmp_path / "log"))
    application = probe.create_app()
    try:
        if kind in {"started", "celery app"}:
            application.start()
        found = application.container.get(Celery) if kind == "celery app" else application
        monkeypatch.setattr(probe, "target", probe.create_app if kind == "factory" else found, raising=False)
        assert main(["report", "support.probe:target"]) == 0
        shown = capsys.readouterr().out
        assert "software -> celery" in shown
        assert "task_default_queue: 'app-under-test'" in shown
        assert application.application_context.is_started == (kind in {"started", "celery app"})
        assert (tmp_path / "log").exists() == application.application_context.is_started
    finally:
        if application.application_context.is_started:
            application.stop()


def test_a_call_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`call` puts a message on the application's own queue, with the options that were given, and prints its id."""
    monkeypatch.setenv("SPAKKY_CELERY__APP_NAME", "queue-of-a-call")
    assert main(["call", TARGET, "support.probe.Calls.greet", "--args", '["Ada"]', "--kwargs", '{"a": 1}']) == 0
    task_id = capsys.readouterr().out.strip()
    with Connection("memory://") as connection, connection.SimpleQueue("queue-of-a-call") as queue:
        message = queue.get(block=False)
        message.ack()
    assert message.headers["task"] == "support.probe.Calls.greet"
    assert message.headers["id"] == task_id
    assert message.payload[:2] == [["Ada"], {"a": 1}]


def test_an_answerless_inspection_has_celerys_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code and the text of Celery's own command come through."""
    assert main(["inspect", TARGET, "ping", "--timeout", "0.1"]) == 69
    assert "No nodes replied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["worker", "--help"], 0, "--concurrency"),
        (["beat", TARGET, "--bogus"], 2, "No such option '--bogus'"),
        (["report", "support.nowhere:app"], 1, "Error: 'support.nowhere:app' does not name an application"),
        (["report", "valueless:app"], 1, "ValueError: of the user"),
    ],
    ids=["help", "bad option", "no module", "module fails"],
)
def test_the_installed_command(arguments: list[str], code: int, shown: str, tmp_path: Path) -> None:
    """The script that is installed ends with the same codes; only errors of the user's own show a traceback."""
    (tmp_path / "valueless.py").write_text("raise ValueError('of the user')\n")
    done = subprocess.run(
        [SPAKKY_CELERY, *arguments],
        env=make_environment({"SPAKKY_CELERY__BROKER_URL": "memory://"}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == ("valueless:app" in arguments)
    assert ("valueless.py" in done.stderr) == ("valueless:app" in arguments)


def test_a_container_is_left_alone_that_is_not_started() -> None:
    """Finding the Celery app of an application builds nothing of it, so that its start is complete."""
    from spakky.plugins.celery.cli import _find_celery

    app = probe.create_app()
    found = _find_celery(app)
    assert "support.probe.Calls.greet" in found.tasks
    app.start()
    try:
        assert app.container.get(Celery) is not found
        assert _find_celery(app) is app.container.get(Celery)
    finally:
        app.stop()
