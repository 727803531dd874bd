"""A stock Celery app that knows nothing of Spakky and of our types, and gives back what its tasks get."""

import json
import os

from celery import Celery

app = Celery("raw", broker=os.environ["RAW_BROKER"], backend=os.environ["RAW_BACKEND"])
app.conf.task_default_queue = os.environ["RAW_QUEUE"]


def give_back(value: object, *, by_keyword: object) -> object:
    assert json.loads(json.dumps(value)) == value == by_keyword, "more than JSON came"
    return value


for name in json.loads(os.environ["RAW_TASKS"]):
    app.task(give_back, name=name)
