"""The house rules: which module may know which, and what a process that only dispatches must not load."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import files
from importlib.util import find_spec, resolve_name
from inspect import getmembers
from pathlib import Path

import pytest
from spakky.core.pod.annotations.pod import Pod

PACKAGE = "spakky.plugins.celery"

SENDING = {
    "after_commit",
    "aspects",
    "aspects.authentication",
    "aspects.task_dispatch",
    "aspects.transactions",
    "amqp_text",
    "batch",
    "broker_link",
    "caller_headers",
    "canvas",
    "composing",
    "configured_task",
    "dead_letters",
    "dispatch",
    "keyword_guard",
    "message_templates",
    "outbox",
    "outlet",
    "prepared_dispatch",
    "producer_connections",
    "publisher",
    "redis_text",
    "text_parts",
    "task_sender",
}
RUNNING = {
    "execution",
    "post_processor",
    "protection_check",
    "replay_memory",
    "run_retry",
    "schedule_principal",
    "seal_check",
}
WORKER_LIFE = {
    "worker",
    "worker.lifecycle",
    "worker.amqp_acks",
    "worker.amqp_batches",
    "worker.amqp_frames",
    "worker.amqp_properties",
    "worker.body_first",
    "worker.bounded_decompression",
    "worker.cold_shutdown",
    "worker.guarded_consumer",
    "worker.hub_calls",
    "worker.loop_calls",
    "worker.loop_watch",
    "worker.masked_request",
    "worker.message_checks",
    "worker.protected_request",
    "worker.pool",
    "worker.pool_run",
    "worker.quick_strategy",
    "worker.job_threads",
    "worker.lasting_objects",
    "worker.round_trips",
    "worker.turns",
}
VALUES = {
    "codec",
    "common",
    "common.amqp_frame",
    "common.annotation_joins",
    "common.batches",
    "common.broker_url",
    "common.celery_options",
    "common.config",
    "common.constants",
    "common.customizer",
    "common.dead_letter",
    "common.forked_client",
    "common.fresh_ids",
    "common.green_threads",
    "common.late_binding",
    "common.plain_json",
    "common.previous",
    "common.progress",
    "common.progress_reporter",
    "common.refused_message",
    "common.remote_errors",
    "common.result_source",
    "common.result_waiter",
    "common.run_key",
    "common.run_state",
    "common.shared_round_trips",
    "common.socket_double",
    "common.task_body",
    "common.task_catalog",
    "common.task_loop",
    "common.task_method",
    "common.task_result",
    "common.tracebacks",
    "common.wire_schema",
    "delegation",
    "error",
    "options",
    "run",
    "schedule",
    "seal",
}
BOTH_ENDS = {"audit", "auth", "caller_identity", "due_snapshots", "sealed_amqp", "snapshot_horizon"}
OBSERVATION = {"instrumentation", "instrumentation.auth_decisions"}
BACK_ENDS = {"instrumentation.auth_log"}
TRANSPORTS = {"transport", "transport.redis", "transport.redis_results"}
COMPOSITION = {"", "cli", "main"}
TESTING = {
    "testing",
    "testing.capture",
    "testing.diversion",
    "testing.fixtures",
    "testing.inline",
    "testing.inline_transport",
    "testing.memory_results",
    "testing.memory_transport",
    "testing.worker",
}

MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(VALUES, VALUES),
    **dict.fromkeys(OBSERVATION, OBSERVATION),
    # One back end knows no other, and nothing but the records: it can be taken out, and others put beside it.
    **dict.fromkeys(BACK_ENDS, OBSERVATION),
    **dict.fromkeys(BOTH_ENDS, VALUES | BOTH_ENDS | OBSERVATION),
    **dict.fromkeys(TRANSPORTS, VALUES),
    **dict.fromkeys(SENDING, VALUES | BOTH_ENDS | OBSERVATION | SENDING),
    **dict.fromkeys(RUNNING, VALUES | BOTH_ENDS | RUNNING),
    **dict.fromkeys(WORKER_LIFE, VALUES | BOTH_ENDS | WORKER_LIFE),
    # Registration hands out handlers whose keywords the host's proxy can take; the guard itself sends nothing.
    "post_processor": VALUES | BOTH_ENDS | RUNNING | {"keyword_guard"},
    "": set(),
    "main": VALUES | BOTH_ENDS | BACK_ENDS | SENDING | RUNNING,
    "cli": VALUES | BOTH_ENDS | SENDING | RUNNING | WORKER_LIFE,
    **dict.fromkeys(TESTING, VALUES | BOTH_ENDS | SENDING | RUNNING | WORKER_LIFE | TESTING),
}
"""For each module, the modules of this package that it may import."""

FORBIDDEN_TO_VALUES = (
    "celery.worker",
    "spakky.core.application.application",
    "spakky.core.application.application_context",
)
FORBIDDEN_TO_ERRORS = ("billiard", "celery", "kombu", "spakky.core.application", "spakky.core.pod")


def root() -> Path:
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def to_name(file: Path) -> str:
    """Name a module without the package before it; the package itself is ''."""
    return ".".join(file.relative_to(root()).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {to_name(file): file for file in sorted(root().rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Every module that a module's source imports, in functions too; relative imports resolved."""
    module = f"{PACKAGE}.{name}".rstrip(".")
    package = module if FILES[name].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return found


def own_imports_of(name: str) -> set[str]:
    prefix = f"{PACKAGE}."
    return {found.removeprefix(prefix) for found in imports_of(name) if found.startswith(prefix)} & FILES.keys()


def is_below(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def is_pod_module(name: str) -> bool:
    """Whether a module defines a Pod, by any annotation that the container takes for one."""
    module = import_module(f"{PACKAGE}.{name}".rstrip("."))
    return any(
        getattr(member, "__module__", None) == module.__name__ and callable(member) and Pod.exists(member)
        for _, member in getmembers(module)
    )


def run_python(program: str) -> str:
    """Run a program in a new interpreter, which has loaded nothing yet."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_a_side() -> None:
    """A new module says on which side it is, or the rules below would not hold for it."""
    sides = SENDING | RUNNING | WORKER_LIFE | VALUES | BOTH_ENDS | TRANSPORTS | COMPOSITION | TESTING
    sides |= OBSERVATION | BACK_ENDS
    assert sorted(FILES) == sorted(sides)
    assert sorted(MAY_IMPORT) == sorted(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_sides_do_not_import_each_other(name: str) -> None:
    """Sending, running and worker life meet in values; only what composes them imports more than one."""
    assert own_imports_of(name) - MAY_IMPORT.get(name, set()) == set()


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_know_neither_container_nor_worker(name: str) -> None:
    """What both sides share can be imported anywhere: it needs no running container and no worker."""
    assert [found for found in sorted(imports_of(name)) if is_below(found, FORBIDDEN_TO_VALUES)] == []


def test_errors_know_no_host_but_the_framework_s_errors() -> None:
    """Errors travel into processes that have no Celery app and no container, and are rebuilt there."""
    assert [found for found in sorted(imports_of("error")) if is_below(found, FORBIDDEN_TO_ERRORS)] == []


def test_a_process_that_only_dispatches_loads_no_worker() -> None:
    """A web process that imports the plugin pays for neither our worker modules nor Celery's."""
    loaded = json.loads(
        run_python("import json, sys, spakky.plugins.celery.main; print(json.dumps(sorted(sys.modules)))"),
    )
    assert f"{PACKAGE}.dispatch" in loaded
    unwanted = (f"{PACKAGE}.worker", f"{PACKAGE}.cli", f"{PACKAGE}.testing", "celery.worker")
    assert [found for found in loaded if is_below(found, unwanted)] == []


def test_the_testing_kit_needs_no_pytest() -> None:
    """pytest is no run-time dependency: the fixtures alone import it."""
    program = "import sys, spakky.plugins.celery.testing; print('pytest' in sys.modules)"
    assert run_python(program).strip() == "False"


def test_the_package_alone_loads_no_celery() -> None:
    """Naming the plugin in ``load_plugins(include={PLUGIN_NAME})`` imports neither Celery nor a module of ours."""
    loaded = json.loads(run_python("import json, sys, spakky.plugins.celery; print(json.dumps(sorted(sys.modules)))"))
    own = [found for found in loaded if is_below(found, (PACKAGE, "celery"))]
    assert own == [PACKAGE]


def test_spakky_and_its_plugins_are_namespace_packages() -> None:
    """An ``__init__.py`` of ours would hide every other distribution below ``spakky``, whichever is installed first."""
    assert [folder for folder in (root().parent, root().parent.parent) if (folder / "__init__.py").exists()] == []
    installed = [str(file) for file in files("spakky-celery") or ()]
    assert not {"spakky/__init__.py", "spakky/plugins/__init__.py"} & set(installed)
    assert [import_module(name).__file__ for name in ("spakky", "spakky.plugins")] == [None, None]


def test_the_package_is_typed() -> None:
    """Type checkers read the annotations of an installed package only where ``py.typed`` is."""
    assert (root() / "py.typed").is_file()


def test_pod_modules_are_found() -> None:
    """The next test looks at the modules that matter."""
    assert {name for name in FILES if is_pod_module(name)} == {
        "aspects.authentication",
        "aspects.task_dispatch",
        "aspects.transactions",
        "common.config",
        "common.task_catalog",
        "common.task_loop",
        "dispatch",
        "instrumentation.auth_log",
        "main",
        "post_processor",
    }


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_container_can_read_the_annotations_of_pods(name: str) -> None:
    """Postponed or guarded imports leave a Pod's annotations as names that nothing answers to at run time."""
    if not is_pod_module(name):
        return
    imported = imports_of(name)
    assert "__future__.annotations" not in imported
    assert "typing.TYPE_CHECKING" not in imported
    assert "TYPE_CHECKING" not in FILES[name].read_text(encoding="utf-8")
