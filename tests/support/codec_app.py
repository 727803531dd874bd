"""An application with one task for each kind of value, and tasks whose arguments must not be shown."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import SecretStr
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.codec import Sensitive
from support.kinds import KINDS
from support.probe import build

CANARY = "c4n4ry"
GATE = "CODEC_GATE"
"""Variable with the path of a file: a task that holds on waits until it is there."""


def to_attribute(kind: str) -> str:
    """Name the task that takes values of a kind."""
    return f"take_{kind.replace(' ', '_')}"


def _make_task(kind: str) -> Callable[..., object]:
    annotation, expected = KINDS[kind]

    def take(self: object, value: Any, *, by_keyword: Any) -> Any:
        for given in (value, by_keyword):
            assert given == expected
            assert type(given) is type(expected)
        return value

    take.__annotations__ = {"value": annotation, "by_keyword": annotation, "return": annotation}
    return task(take)


Kinds: Any = TaskHandler()(
    type("Kinds", (), {"__module__": __name__, **{to_attribute(kind): _make_task(kind) for kind in KINDS}}),
)


@dataclass
class Login:
    user: str
    password: SecretStr


@TaskHandler()
class Vault:
    @task
    async def open_it(self, login: Login, code: Annotated[str, Sensitive()], *, hint: SecretStr) -> SecretStr:
        secrets = {login.password.get_secret_value(), code, hint.get_secret_value()}
        assert secrets == {CANARY}, "the secrets did not arrive"
        while not Path(os.environ[GATE]).exists():  # noqa: ASYNC110, ASYNC240  # another process makes it
            await asyncio.sleep(0.01)
        return SecretStr(f"{CANARY} and more")

    @task
    def break_it(self, code: Annotated[str, Sensitive()]) -> None:
        message = f"no code of {len(code)} letters opens it"
        raise ValueError(message)

    @task
    def weigh(self, wrong: bool) -> int:  # a task's argument
        return "heavy" if wrong else 3  # type: ignore[return-value]  # that is the case


def create_app() -> SpakkyApplication:
    return build(Kinds, Vault)
