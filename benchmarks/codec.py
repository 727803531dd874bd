"""What the codec costs per call and side, beside raw Celery's JSON, Celery's ``pydantic=True``, and code by hand.

    .venv/bin/python benchmarks/codec.py

Figures are medians of rounds that take turns, in microseconds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from celery import Celery
from kombu.serialization import dumps, loads
from pydantic import BaseModel
from spakky.task import task

from spakky.plugins.celery.codec import TaskCodec, codec_of
from spakky.plugins.celery.common.task_method import find_task_methods

ROUNDS = 9
CALLS = 5000


class Line(BaseModel):
    title: str
    price: Decimal


class Invoice(BaseModel):
    number: int
    lines: list[Line]


@dataclass
class Point:
    x: int
    y: int


class Handler:
    @task
    def scalars(self, name: str, count: int, *, ratio: float, is_new: bool = True) -> str: ...

    @task
    def plain(self, point: Point) -> Point: ...

    @task
    def model(self, invoice: Invoice) -> Invoice: ...


celery = Celery("codec", broker="memory://", set_as_current=False)


@celery.task(pydantic=True)
def model(invoice: Invoice) -> Invoice:
    return invoice


@celery.task(pydantic=True)
def scalars(name: str, count: int, *, ratio: float, is_new: bool = True) -> str:  # noqa: ARG001  # as the handler has it
    return name


INVOICE = Invoice(number=7, lines=[Line(title="tea", price=Decimal("1.10")), Line(title="cup", price=Decimal(4))])
CODECS = {method.attribute: codec_of(method) for method in find_task_methods(Handler)}
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "scalars": (("tea", 3), {"ratio": 0.5}),
    "plain": ((Point(1, 2),), {}),
    "model": ((INVOICE,), {}),
}


def time_one(function: Callable[[], object]) -> float:
    """Microseconds per call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - begin) / CALLS * 1e6


def sides(codec: TaskCodec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Both sides of a call, and what raw Celery does with the same arguments on each."""
    wire = codec.encode_arguments(args, kwargs)
    body = dumps((*wire, {}), "json")
    return {
        "encode": lambda: codec.encode_arguments(args, kwargs),
        "raw Celery's JSON, dumps": lambda: dumps((*wire, {}), "json"),
        "decode": lambda: codec.decode_arguments(*wire),
        "raw Celery's JSON, loads": lambda: loads(body[2], body[0], body[1]),
    }


def run_in_worker(codec: TaskCodec, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> object:
    """Do what ``pydantic=True`` does around a body: arguments become values, and the result becomes JSON."""
    codec.decode_arguments(args, kwargs)
    return codec.encode_result(result)


def main() -> None:
    functions: dict[str, Callable[[], object]] = {}
    for name, (args, kwargs) in ARGUMENTS.items():
        functions |= {f"{name}, {side}": call for side, call in sides(CODECS[name], args, kwargs).items()}
    dumped = INVOICE.model_dump(mode="json")
    functions["model by hand, model_dump(mode='json')"] = lambda: INVOICE.model_dump(mode="json")
    functions["model by hand, model_validate()"] = lambda: Invoice.model_validate(dumped)
    functions["plain by hand, asdict()"] = lambda: asdict(Point(1, 2))
    args, kwargs = ARGUMENTS["scalars"]
    functions["scalars, in a worker: decode, encode the result"] = lambda: run_in_worker(
        CODECS["scalars"], args, kwargs, "tea"
    )
    functions["scalars, in a worker: Celery's pydantic=True"] = lambda: scalars(*args, **kwargs)
    functions["model, in a worker: decode, encode the result"] = lambda: run_in_worker(
        CODECS["model"], (dumped,), {}, INVOICE
    )
    functions["model, in a worker: Celery's pydantic=True"] = lambda: model(dumped)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            taken[name].append(time_one(function))
    for name, times in taken.items():
        print(f"{statistics.median(times):8.2f} us  {name}")


if __name__ == "__main__":
    main()
