"""Celery alone, with the bodies that it can run: sync ones."""

import os
import time

from celery import Celery
from producing import add_text, produce, read_arguments
from recorder import record

app = Celery("bench", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_default_queue=os.environ["BENCH_QUEUE"],
    task_ignore_result=True,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
)


@app.task(name="empty")
def empty(dispatched: float) -> None:
    record(dispatched, time.time())


@app.task(name="text")
def text(dispatched: float, text: str) -> None:
    assert text
    record(dispatched, time.time())


@app.task(name="sleep")
def sleep(dispatched: float) -> None:
    begun = time.time()
    time.sleep(0.05)
    record(dispatched, begun)


@app.task(name="hold")
def hold(dispatched: float) -> None:
    begun = time.time()
    time.sleep(3)
    record(dispatched, begun)


def other() -> None: ...


for number in range(int(os.environ.get("BENCH_TASKS", "0"))):
    app.task(name=f"other-{number}")(other)


def main() -> None:
    workload, count, rate = read_arguments()
    produce(add_text(workload, app.tasks[workload].delay), count, rate)
