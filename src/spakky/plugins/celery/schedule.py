"""Owns the translation of a ``@schedule`` into a Celery schedule. Registers none, and knows no container."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any, Final, NoReturn, cast, override

from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedstate
from celery.schedules import schedule as interval_schedule
from celery.utils.time import timezone as zones
from spakky.task.stereotype.crontab import Crontab
from spakky.task.stereotype.schedule import ScheduleRoute

from spakky.plugins.celery.error import InvalidScheduleRouteError

__all__ = ["DailyAt", "to_celery_schedule"]

_RANGES: Final = {"month": (1, 12), "day": (1, 31), "weekday": (0, 6), "hour": (0, 23), "minute": (0, 59)}
_LONGEST_MONTHS: Final = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
_EVERY: Final = "*"


def to_celery_schedule(route: ScheduleRoute, *, handler: str, method: str, app: Celery) -> BaseSchedule:
    """Make the Celery schedule that fires when a route says.

    Args:
        route: Exactly one of interval, at and crontab.
        handler: Name of the handler class, for error texts.
        method: Name of the method, for error texts.
        app: The Celery app, whose timezone holds where the route names none.

    Returns:
        A schedule bound to the app, which keeps the app's timezone in beat's schedule file.

    Raises:
        InvalidScheduleRouteError: If the route cannot be kept.
    """
    given = [name for name in ("interval", "at", "crontab") if getattr(route, name) is not None]
    checker = _Checker(handler, method)
    if len(given) != 1:
        checker.refuse("schedule", given, "Give exactly one of interval, at and crontab.")
    if route.interval is not None:
        return _Interval(checker.check_interval(route.interval), app=app)
    if route.at is not None:
        return DailyAt(checker.check_at(route.at), app=app)
    return _to_crontab(checker.check_crontab(route.crontab), app)


@dataclass(frozen=True)
class _AppFacts:
    """What a schedule asks of its app, and nothing else of it: beat's file must hold no broker password."""

    zone: str | tzinfo | None
    enable_utc: bool
    beat_cron_starting_deadline: float | None

    @classmethod
    def from_app(cls, app: Celery) -> "_AppFacts":
        conf = app.conf
        return cls(conf.timezone, conf.enable_utc, conf.beat_cron_starting_deadline)

    @property
    def conf(self) -> "_AppFacts":
        return self

    @property
    def timezone(self) -> tzinfo:
        """The rule of ``Celery.timezone``; a system zone is looked up again, because not every one can be pickled."""
        if self.zone:
            return cast("tzinfo", zones.get_timezone(self.zone))
        return cast("tzinfo", zones.utc if self.enable_utc else zones.local)

    def now(self) -> datetime:
        return datetime.now(UTC).astimezone(self.timezone)


class _KeepsAppFacts(BaseSchedule):  # type: ignore[misc]  # Celery ships no types
    """Schedule that knows its app's timezone after beat has read it back from its file.

    Celery's ``PersistentScheduler`` syncs as soon as it has started, and every entry that it reads afterwards has the
    app None (``ScheduleEntry.__reduce__``): Celery's own schedules ask ``current_app`` then, whose timezone is another.

    Those files name this module and its classes: beat does not start over a file with a name that is gone.
    """

    _app: Celery | None
    _facts: _AppFacts | None = None

    @property
    def app(self) -> Any:
        return self._app or self._facts or super().app

    @app.setter
    def app(self, app: Celery | None) -> None:
        self._app = app or self._app

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _to_state(self) -> dict[str, Any]:
        facts = self._facts if self._app is None else _AppFacts.from_app(self._app)
        return {"nowfun": self.nowfun, "_facts": facts}


class _Interval(_KeepsAppFacts, interval_schedule):  # type: ignore[misc]  # Celery ships no types
    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _Interval, (self.run_every, self.relative), self._to_state()


class _Crontab(_KeepsAppFacts, crontab):  # type: ignore[misc]  # Celery ships no types
    @override
    def __reduce__(self) -> tuple[Any, ...]:
        _, fields, _ = crontab.__reduce__(self)
        return _Crontab, fields, self._to_state()


class DailyAt(_KeepsAppFacts):
    """Celery schedule that fires once on every day of a zone's calendar, at a time of day by that zone's wall clock.

    A time that the clocks skip when daylight saving starts fires as much later as they skip, or as much earlier where
    later would be the next day. One that they repeat when it ends fires the first time.

    After a time without beat it fires once, unless the last fire time is longer ago than Celery's
    ``beat_cron_starting_deadline`` allows, which holds here as it does for crontabs. That needs a scheduler that
    remembers the last run, as beat's default one does in its file.
    """

    def __init__(self, at: time, nowfun: Callable[[], datetime] | None = None, app: Celery | None = None) -> None:
        """Make a schedule.

        Args:
            at: Time of day, to the microsecond. Its ``tzinfo`` names the zone; None means the app's timezone.
                ``fold`` is ignored.
            nowfun: Clock that returns an aware datetime; None for the app's. It is pickled with the schedule.
            app: The Celery app; None for the current one.
        """
        self.at = at.replace(fold=0)
        super().__init__(nowfun=nowfun, app=app)

    @override
    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """Time from now until the first fire time after the last run; negative when that is over."""
        return self._next_after(self._to_utc(last_run_at)) - self._to_utc(self.now())

    @override
    def is_due(self, last_run_at: datetime) -> schedstate:
        """Say whether to fire now, and in how many seconds to ask again."""
        now = self._to_utc(self.now())
        is_due = self._next_after(self._to_utc(last_run_at)) <= now and self._is_within_deadline(now)
        return schedstate(is_due, (self._next_after(now) - now).total_seconds())

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DailyAt):
            return NotImplemented
        return (self.at, self.at.tzinfo) == (other.at, other.at.tzinfo)

    @override
    def __hash__(self) -> int:
        return hash(self.at)

    @override
    def __repr__(self) -> str:
        return f"<daily at: {self.at}{f' {self.at.tzinfo}' if self.at.tzinfo else ''}>"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return DailyAt, (self.at,), self._to_state()

    def _to_utc(self, moment: datetime) -> datetime:
        """Naive moments are in UTC, as everywhere in Celery's schedules."""
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)

    def _is_within_deadline(self, now: datetime) -> bool:
        deadline_s = self.app.conf.beat_cron_starting_deadline
        return deadline_s is None or (now - self._last_until(now)).total_seconds() <= deadline_s

    def _next_after(self, moment: datetime) -> datetime:
        return next(fire for fire in self._fires_around(moment) if fire > moment)

    def _last_until(self, moment: datetime) -> datetime:
        return next(fire for fire in reversed(self._fires_around(moment)) if fire <= moment)

    def _fires_around(self, moment: datetime) -> list[datetime]:
        """Reach two days ahead: tomorrow's time may be over where a day is left out or clocks go back over midnight."""
        today = moment.astimezone(self._zone).date()
        return [self._fire_on(today + timedelta(days=offset)) for offset in (-1, 0, 1, 2)]

    def _fire_on(self, day: date) -> datetime:
        # In a gap, fold 0 means the offset before it and leads past it; fold 1 leads to before it (PEP 495).
        local = datetime.combine(day, self.at, tzinfo=self._zone)
        fire = local.astimezone(UTC)
        return fire if fire.astimezone(self._zone).date() == day else local.replace(fold=1).astimezone(UTC)

    @property
    def _zone(self) -> tzinfo:
        return self.at.tzinfo or cast("tzinfo", self.app.timezone)


def _to_crontab(route: Crontab, app: Celery) -> _Crontab:
    weekdays = None if route.weekday is None else tuple((day + 1) % 7 for day in _to_tuple(route.weekday))
    return _Crontab(
        minute=_to_field(route.minute),
        hour=_to_field(route.hour),
        day_of_month=_to_field(route.day),
        month_of_year=_to_field(route.month),
        day_of_week=_to_field(weekdays),  # Celery's week starts on Sunday, Spakky's on Monday
        app=app,
    )


def _to_field(value: Any) -> str:
    return _EVERY if value is None else ",".join(str(int(part)) for part in _to_tuple(value))


def _to_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class _Checker:
    """Checks the parts of one method's route, each with an error that names it."""

    def __init__(self, handler: str, method: str) -> None:
        self._handler = handler
        self._method = method

    def refuse(self, field: str, value: object, expected: str) -> NoReturn:
        raise InvalidScheduleRouteError(self._handler, self._method, field, repr(value), expected)

    def check_interval(self, value: object) -> timedelta:
        if not isinstance(value, timedelta) or value <= timedelta(0):
            self.refuse("interval", value, "Give a timedelta greater than zero.")
        return value

    def check_at(self, value: object) -> time:
        if not isinstance(value, time):
            self.refuse("at", value, "Give a datetime.time, such as time(9, 30).")
        return value

    def check_crontab(self, value: object) -> Crontab:
        if not isinstance(value, Crontab):
            self.refuse("crontab", value, "Give a Crontab, such as Crontab(hour=9).")
        for field in _RANGES:
            self._check_field(field, getattr(value, field))
        self._check_fires(value)
        return value

    def _check_field(self, field: str, value: object) -> None:
        if value is None:
            return
        low, high = _RANGES[field]
        parts = _to_tuple(value)
        if not parts or not all(
            isinstance(part, int) and not isinstance(part, bool) and low <= part <= high for part in parts
        ):
            expected = f"Give a whole number from {low} to {high}, a tuple of such numbers, or None for every {field}."
            self.refuse(f"crontab.{field}", value, expected)

    def _check_fires(self, value: Crontab) -> None:
        if value.day is None or value.month is None:
            return
        earliest = min(_to_tuple(value.day))
        if all(earliest > _LONGEST_MONTHS.get(month, 31) for month in _to_tuple(value.month)):
            expected = "Give a day that one of the months has: this schedule would never fire."
            self.refuse("crontab.day", value.day, expected)
