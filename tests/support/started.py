"""A module whose application is started when it is imported, as Celery's own command needs it."""

from celery import Celery

from support.probe import create_app

app = create_app().start()
celery = app.container.get(Celery)
celery.conf.beat_schedule = {"mine": {"task": "support.probe.Clock.tick", "schedule": 3600.0}}
