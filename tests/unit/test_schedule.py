"""What a @schedule means to Celery: when it fires, by simulated clocks, and what is refused."""

import copy
import pickle
import shelve
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import celery.schedules
import pytest
from celery import Celery
from celery.beat import PersistentScheduler, Scheduler
from celery.schedules import BaseSchedule, crontab
from celery.utils.time import timezone as celery_zones
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spakky.task import Crontab, Month, ScheduleRoute, Weekday

from spakky.plugins.celery.error import InvalidScheduleRouteError
from spakky.plugins.celery.schedule import DailyAt, to_celery_schedule

NEW_YORK = ZoneInfo("America/New_York")
SEOUL = ZoneInfo("Asia/Seoul")
NUUK = ZoneInfo("America/Nuuk")
ZONES = sorted(available_timezones() - {"localtime"})


class Clock:
    """The simulated time, in one place: beat's file holds the clock by its module's name."""

    now = datetime(2026, 3, 1, tzinfo=UTC)


def read_clock() -> datetime:
    return Clock.now


class _Recorder:
    """Beat's own scheduler, but what it would send is noted with the simulated time."""

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **_: Any) -> None:
        assert not advance
        self.app.fired.append((entry.name, Clock.now))


class RecordingScheduler(_Recorder, Scheduler):
    pass


class RecordingPersistentScheduler(_Recorder, PersistentScheduler):
    pass


class NoApp:
    """In the place of ``current_app``: whoever asks it for anything fails."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(name)


@pytest.fixture
def no_current_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(celery.schedules, "current_app", NoApp())


@pytest.fixture
def reset_clock() -> Iterator[None]:
    before = Clock.now
    yield
    Clock.now = before


def make_app(**conf: object) -> Celery:
    app = Celery("test", broker="memory://", set_as_current=False)
    app.conf.update({"timezone": "UTC", "enable_utc": True, **conf})
    return app


def convert(app: Celery | None = None, **route: object) -> BaseSchedule:
    return to_celery_schedule(
        ScheduleRoute(**route),  # type: ignore[arg-type]  # wrong values are what some tests give
        handler="pkg.Handler",
        method="run",
        app=app or make_app(),
    )


def fires_between(schedule: BaseSchedule, start: datetime, end: datetime) -> list[datetime]:
    """Fire a schedule as beat does: ask, wait as long as it says, ask again."""
    now = start
    schedule.nowfun = lambda: now
    last_run, fired = start, []
    while now < end:
        is_due, wait_s = schedule.is_due(last_run)
        if is_due:
            fired.append(now)
            last_run = now
        now += timedelta(seconds=max(wait_s, 0.001))
    return fired


def make_beat_app(schedules: dict[str, dict[str, object]], **conf: object) -> Celery:
    app = make_app(result_expires=None, **conf)
    app.fired = []
    app.conf.beat_schedule = {
        name: {"task": "t", "schedule": convert(app, **route)} for name, route in schedules.items()
    }
    for entry in app.conf.beat_schedule.values():
        entry["schedule"].nowfun = read_clock
    return app


def run_beat(scheduler: Scheduler, until: datetime) -> None:
    """Tick as beat's service does, and let simulated time pass for as long as each tick asks."""
    while Clock.now < until:
        Clock.now += timedelta(seconds=max(scheduler.tick(), 0.005))


def fired_of(app: Celery, name: str) -> list[datetime]:
    return [moment for fired, moment in app.fired if fired == name]


def local(fired: list[datetime], zone: ZoneInfo) -> list[str]:
    return [moment.astimezone(zone).strftime("%a %d %H:%M:%S") for moment in fired]


@pytest.mark.parametrize("weekday", Weekday)
def test_weekday_fires_on_that_day(weekday: Weekday) -> None:
    """Each of Spakky's weekdays fires on the day of its name, as Celery itself computes the fire times."""
    schedule = convert(crontab=Crontab(weekday=weekday, hour=9, minute=30))
    fired = fires_between(schedule, datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 15, tzinfo=UTC))
    assert [moment.weekday() for moment in fired] == [weekday, weekday]
    assert {(moment.hour, moment.minute) for moment in fired} == {(9, 30)}


@pytest.mark.parametrize("weekday", Weekday)
def test_weekday_by_celerys_remaining_time(weekday: Weekday) -> None:
    """Celery's remaining_estimate and remaining_delta lead to the day of the weekday's name."""
    schedule = convert(crontab=Crontab(weekday=weekday, hour=9))
    sunday_night = datetime(2026, 3, 1, 23, tzinfo=UTC)
    schedule.nowfun = lambda: sunday_night
    expected = datetime(2026, 3, 2, 9, tzinfo=UTC) + timedelta(days=weekday)
    assert sunday_night + schedule.remaining_estimate(sunday_night) == expected
    last_run, delta, _now = schedule.remaining_delta(sunday_night)
    assert last_run + delta == expected


def test_weekday_tuple() -> None:
    """A tuple of weekdays fires on each of them, at midnight where neither hour nor minute is given."""
    schedule = convert(crontab=Crontab(weekday=(Weekday.MONDAY, Weekday.SATURDAY, Weekday.SUNDAY)))
    fired = fires_between(schedule, datetime(2026, 3, 2, 12, tzinfo=UTC), datetime(2026, 3, 9, 12, tzinfo=UTC))
    assert [moment.strftime("%a %H:%M") for moment in fired] == ["Sat 00:00", "Sun 00:00", "Mon 00:00"]


@pytest.mark.parametrize(
    ("crontab", "expected"),
    [
        (Crontab(minute=(0, 20, 40)), ["00:20", "00:40"]),
        (Crontab(hour=(1, 3), minute=5), ["01:05", "03:05"]),
        (Crontab(hour=(1, 3), minute=(5, 50)), ["01:05", "01:50", "03:05", "03:50"]),
        (Crontab(hour=None, minute=30), ["00:30", "01:30", "02:30", "03:30"]),
        (Crontab(hour=0, minute=None), [f"00:{minute:02}" for minute in range(1, 60)]),
    ],
)
def test_hour_and_minute_fields(crontab: Crontab, expected: list[str]) -> None:
    """Tuples and None work in hour and minute, whatever the host's type hints say."""
    fired = fires_between(
        convert(crontab=crontab), datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 1, 4, tzinfo=UTC)
    )
    assert [moment.strftime("%H:%M") for moment in fired] == expected


def test_none_in_every_field() -> None:
    """None in all five fields is every minute."""
    schedule = convert(crontab=Crontab(month=None, day=None, weekday=None, hour=None, minute=None))  # type: ignore[arg-type]
    fired = fires_between(schedule, datetime(2026, 2, 28, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC))
    assert len(fired) == 2 * 24 * 60 - 1


@pytest.mark.parametrize(
    ("crontab", "expected"),
    [
        (Crontab(month=Month.FEBRUARY, day=None), [f"{day:02}.02." for day in range(1, 29)]),
        (Crontab(month=None, day=31), ["31.01.", "31.03.", "31.05.", "31.07.", "31.08.", "31.10.", "31.12."]),
    ],
)
def test_none_in_day_or_month(crontab: Crontab, expected: list[str]) -> None:
    """None in day is every day of the month, None in month every month that has the day."""
    fired = fires_between(convert(crontab=crontab), datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))
    assert [moment.strftime("%d.%m.") for moment in fired] == expected


def test_day_and_month_tuples() -> None:
    """Tuples work in day and month."""
    schedule = convert(crontab=Crontab(month=(Month.JANUARY, Month.MARCH), day=(1, 15)))
    fired = fires_between(schedule, datetime(2026, 1, 1, 12, tzinfo=UTC), datetime(2027, 1, 1, 12, tzinfo=UTC))
    assert [moment.strftime("%d.%m.") for moment in fired] == ["15.01.", "01.03.", "15.03.", "01.01."]


def test_crontab_in_the_apps_timezone() -> None:
    """A crontab means the wall clock of the configured timezone."""
    app = make_app()
    app.conf.timezone = "Asia/Seoul"
    fired = fires_between(
        convert(app, crontab=Crontab(hour=9)),
        datetime(2026, 3, 1, tzinfo=SEOUL),
        datetime(2026, 3, 3, tzinfo=SEOUL),
    )
    assert local(fired, SEOUL) == ["Sun 01 09:00:00", "Mon 02 09:00:00"]


def test_interval() -> None:
    """An interval fires that far apart."""
    schedule = convert(interval=timedelta(minutes=90))
    fired = fires_between(schedule, datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 1, 5, tzinfo=UTC))
    assert [moment.strftime("%H:%M") for moment in fired] == ["01:30", "03:00", "04:30"]


def test_at_with_seconds() -> None:
    """A time of day fires at its seconds, to the microsecond."""
    schedule = convert(at=time(7, 15, 42, 500_000))
    fired = fires_between(schedule, datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 3, tzinfo=UTC))
    assert fired == [datetime(2026, 3, day, 7, 15, 42, 500_000, tzinfo=UTC) for day in (1, 2)]


@pytest.mark.parametrize(
    ("enable_utc", "timezone", "expected_hour"),
    [(True, "UTC", 9), (True, "Asia/Seoul", 0), (False, "Asia/Seoul", 0)],
)
def test_at_in_the_apps_timezone(enable_utc: bool, timezone: str, expected_hour: int) -> None:
    """Without a tzinfo a time of day means the configured timezone, with and without enable_utc."""
    app = make_app()
    app.conf.update(timezone=timezone, enable_utc=enable_utc)
    fired = fires_between(
        convert(app, at=time(9)),
        datetime(2026, 2, 28, 23, tzinfo=UTC),
        datetime(2026, 3, 1, 22, tzinfo=UTC),
    )
    assert [moment.astimezone(UTC).hour for moment in fired] == [expected_hour]


def test_at_in_the_systems_timezone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enable_utc off and no timezone set, a time of day means the system's zone, as Celery.timezone does."""
    monkeypatch.setattr(celery_zones, "local", NEW_YORK)
    app = Celery("test", set_as_current=False)
    app.conf.update(enable_utc=False)
    now = datetime(2026, 3, 1, tzinfo=UTC)
    for schedule in (convert(app, at=time(9)), pickle.loads(pickle.dumps(convert(app, at=time(9))))):
        schedule.nowfun = lambda: now
        assert now + schedule.remaining_estimate(now) == datetime(2026, 3, 1, 14, tzinfo=UTC)


def test_naive_moments_are_utc() -> None:
    """Naive moments, of the clock or of the last run, are in UTC, as in Celery's own schedules."""
    schedule = convert(at=time(9, tzinfo=SEOUL))
    schedule.nowfun = lambda: datetime(2026, 3, 1, 0, 0, 5)  # noqa: DTZ001  # naive is the subject
    assert schedule.is_due(datetime(2026, 2, 28, 23, 59)) == (True, 24 * 3600 - 5)  # noqa: DTZ001  # the same
    assert not schedule.is_due(datetime(2026, 3, 1, 0, 0, 1)).is_due  # noqa: DTZ001  # the same


def test_at_keeps_the_wall_clock_when_summer_begins() -> None:
    """09:00 in a zone stays 09:00 on its wall clock when daylight saving starts."""
    schedule = convert(at=time(9, tzinfo=NEW_YORK))
    fired = fires_between(schedule, datetime(2026, 3, 6, 12, tzinfo=UTC), datetime(2026, 3, 10, 12, tzinfo=UTC))
    assert local(fired, NEW_YORK) == ["Fri 06 09:00:00", "Sat 07 09:00:00", "Sun 08 09:00:00", "Mon 09 09:00:00"]
    assert [moment.hour for moment in fired] == [14, 14, 13, 13]


def test_at_keeps_the_wall_clock_when_summer_ends() -> None:
    """09:00 in a zone stays 09:00 on its wall clock when daylight saving ends."""
    schedule = convert(at=time(9, tzinfo=NEW_YORK))
    fired = fires_between(schedule, datetime(2026, 10, 30, 12, tzinfo=UTC), datetime(2026, 11, 2, 22, tzinfo=UTC))
    assert local(fired, NEW_YORK) == ["Fri 30 09:00:00", "Sat 31 09:00:00", "Sun 01 09:00:00", "Mon 02 09:00:00"]
    assert [moment.hour for moment in fired] == [13, 13, 14, 14]


def test_at_in_the_spring_gap() -> None:
    """A time that the clocks skip fires once that day, as much later as they skip."""
    schedule = convert(at=time(2, 30, tzinfo=NEW_YORK))
    fired = fires_between(schedule, datetime(2026, 3, 7, tzinfo=UTC), datetime(2026, 3, 10, tzinfo=UTC))
    assert local(fired, NEW_YORK) == ["Sat 07 02:30:00", "Sun 08 03:30:00", "Mon 09 02:30:00"]


def test_at_in_a_gap_that_ends_at_midnight() -> None:
    """A skipped time whose later moment is the next day's fires as much earlier: no day has two, none has none."""
    fired = fires_between(
        convert(at=time(23, 30, tzinfo=NUUK)),
        datetime(2024, 3, 29, 12, tzinfo=UTC),
        datetime(2024, 4, 1, 12, tzinfo=UTC),
    )
    assert local(fired, NUUK) == ["Fri 29 23:30:00", "Sat 30 22:30:00", "Sun 31 23:30:00"]


def test_at_when_a_zone_leaves_out_a_day() -> None:
    """Samoa had no 30 December 2011: nothing fires for it, and nothing twice."""
    apia = ZoneInfo("Pacific/Apia")
    fired = fires_between(
        convert(at=time(9, tzinfo=apia)),
        datetime(2011, 12, 28, 12, tzinfo=UTC),
        datetime(2012, 1, 1, 12, tzinfo=UTC),
    )
    assert local(fired, apia) == ["Wed 28 09:00:00", "Thu 29 09:00:00", "Sat 31 09:00:00", "Sun 01 09:00:00"]


def test_at_in_the_autumn_overlap() -> None:
    """A time that the clocks repeat fires once that day, the first time; fold is ignored."""
    schedule = convert(at=time(1, 30, tzinfo=NEW_YORK, fold=1))
    fired = fires_between(schedule, datetime(2026, 10, 31, tzinfo=UTC), datetime(2026, 11, 3, tzinfo=UTC))
    assert [moment.isoformat() for moment in fired] == [
        "2026-10-31T05:30:00+00:00",
        "2026-11-01T05:30:00+00:00",
        "2026-11-02T06:30:00+00:00",
    ]


def test_at_after_a_pause_of_beat() -> None:
    """After days without beat a daily schedule fires once, and then at its time again."""
    schedule = convert(at=time(9))
    now = datetime(2026, 3, 10, 15, tzinfo=UTC)
    schedule.nowfun = lambda: now
    assert schedule.is_due(datetime(2026, 3, 7, 9, 0, 1, tzinfo=UTC)) == (True, 18 * 3600)
    assert schedule.is_due(now) == (False, 18 * 3600)
    assert schedule.remaining_estimate(now) == timedelta(hours=18)


def test_at_obeys_celerys_starting_deadline() -> None:
    """A fire time missed by more than beat_cron_starting_deadline is left out, as Celery leaves out crontabs."""
    schedule = convert(make_app(beat_cron_starting_deadline=600), at=time(9))
    last_run = datetime(2026, 3, 9, 9, tzinfo=UTC)
    schedule.nowfun = lambda: datetime(2026, 3, 10, 9, 9, tzinfo=UTC)
    assert schedule.is_due(last_run).is_due
    schedule.nowfun = lambda: datetime(2026, 3, 10, 9, 11, tzinfo=UTC)
    assert not schedule.is_due(last_run).is_due


@pytest.mark.parametrize(
    ("zone", "at", "start", "moment"),
    [
        (NEW_YORK, time(2, 30), datetime(2026, 3, 8, 6, tzinfo=UTC), datetime(2026, 3, 8, 12, tzinfo=UTC)),
        (NEW_YORK, time(1, 30), datetime(2026, 11, 1, 5, tzinfo=UTC), datetime(2026, 11, 1, 6, 45, tzinfo=UTC)),
    ],
)
def test_pause_of_beat_over_a_clock_change(zone: ZoneInfo, at: time, start: datetime, moment: datetime) -> None:
    """A gap's or an overlap's fire time that beat slept through is caught up once, also inside the repeated hour."""
    schedule = convert(at=at.replace(tzinfo=zone))
    schedule.nowfun = lambda: moment
    assert schedule.is_due(start).is_due
    next_day = datetime.combine(moment.astimezone(zone).date() + timedelta(days=1), at, tzinfo=zone).astimezone(UTC)
    assert schedule.is_due(moment) == (False, (next_day - moment).total_seconds())


@settings(max_examples=300, deadline=None)
@given(
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
    paused_s=st.integers(1, 400_000),
    deadline_s=st.one_of(st.none(), st.integers(0, 100_000)),
)
@example(hour=0, minute=0, paused_s=30, deadline_s=None)
@example(hour=9, minute=0, paused_s=86400, deadline_s=3600)
@example(hour=9, minute=0, paused_s=10 * 3600, deadline_s=3600)
@example(hour=9, minute=0, paused_s=10 * 3600 + 1, deadline_s=3600)
def test_at_is_due_as_celerys_crontab_is(hour: int, minute: int, paused_s: int, deadline_s: int | None) -> None:
    """Where a crontab can say the same, the catch-up, the starting deadline and the next time are the crontab's."""
    app = make_app(beat_cron_starting_deadline=deadline_s)
    last_run = datetime(2026, 3, 4, 0, 0, 0, tzinfo=UTC)
    now = last_run + timedelta(seconds=paused_s)
    ours, celerys = convert(app, at=time(hour, minute)), crontab(hour=hour, minute=minute, app=app)
    ours.nowfun = celerys.nowfun = lambda: now
    assert ours.is_due(last_run) == celerys.is_due(last_run)
    assert ours.remaining_estimate(last_run) == celerys.remaining_estimate(last_run)


def days_of(zone: ZoneInfo, begin: datetime, end: datetime) -> list[date]:
    """The days of a zone's calendar that lie wholly between two instants, by walking through them."""
    steps = range(int((end - begin) / timedelta(minutes=15)))
    seen = {(begin + timedelta(minutes=15 * step)).astimezone(zone).date() for step in steps}
    return sorted(seen)[1:-1]


@settings(max_examples=150, deadline=None)
@given(
    start=st.datetimes(min_value=datetime(1975, 1, 1), max_value=datetime(2036, 1, 1)),  # noqa: DTZ001  # made aware below
    at=st.times(),
    zone=st.sampled_from(ZONES),
)
@example(datetime(2026, 3, 1), time(2, 30), "America/New_York")  # noqa: DTZ001  # spring
@example(datetime(2026, 10, 25), time(1, 30), "America/New_York")  # noqa: DTZ001  # autumn
@example(datetime(2026, 3, 30), time(1, 45), "Australia/Lord_Howe")  # noqa: DTZ001  # half an hour
@example(datetime(2024, 3, 25), time(23, 30), "America/Nuuk")  # noqa: DTZ001  # gap up to midnight
@example(datetime(2024, 10, 20), time(23, 30), "America/Nuuk")  # noqa: DTZ001  # overlap up to midnight
@example(datetime(2018, 5, 1), time(23, 45), "Asia/Pyongyang")  # noqa: DTZ001  # the same, half an hour
@example(datetime(2017, 10, 10), time(0, 30), "America/Sao_Paulo")  # noqa: DTZ001  # gap from midnight
@example(datetime(2006, 10, 24), time(0, 0, 30), "America/St_Johns")  # noqa: DTZ001  # back over midnight, from 00:01
@example(datetime(2010, 3, 1), time(0, 30), "Antarctica/Casey")  # noqa: DTZ001  # back over midnight by three hours
@example(datetime(2011, 12, 25), time(9), "Pacific/Apia")  # noqa: DTZ001  # no such day
def test_at_fires_once_on_every_local_day(start: datetime, at: time, zone: str) -> None:
    """Whatever the zone, the time and the start, every day of the zone's calendar has exactly one fire time."""
    tz, begin = ZoneInfo(zone), start.replace(tzinfo=UTC)
    end = begin + timedelta(days=10)
    fired = fires_between(convert(at=at.replace(tzinfo=tz)), begin, end)
    count = Counter(moment.astimezone(tz).date() for moment in fired)
    days = days_of(tz, begin, end)
    assert len(days) >= 7
    assert [count[day] for day in days] == [1] * len(days)


@pytest.mark.usefixtures("reset_clock")
@pytest.mark.parametrize(
    ("at", "start", "expected"),
    [
        (time(2, 30, 15), datetime(2026, 3, 7, tzinfo=UTC), ["Sat 07 02:30:15", "Sun 08 03:30:15", "Mon 09 02:30:15"]),
        (time(9), datetime(2026, 3, 7, tzinfo=UTC), ["Sat 07 09:00:00", "Sun 08 09:00:00", "Mon 09 09:00:00"]),
        (time(1, 30), datetime(2026, 10, 31, tzinfo=UTC), ["Sat 31 01:30:00", "Sun 01 01:30:00", "Mon 02 01:30:00"]),
    ],
)
def test_beat_ticks_through_a_dst_weekend(at: time, start: datetime, expected: list[str]) -> None:
    """Celery's own scheduler, ticking over a weekend of a clock change, sends a daily task exactly once a day."""
    Clock.now = start
    app = make_beat_app(
        {"zoned": {"at": at.replace(tzinfo=NEW_YORK)}, "app's": {"at": at}}, timezone="America/New_York"
    )
    scheduler = RecordingScheduler(app=app)
    run_beat(scheduler, start + timedelta(days=3))
    scheduler.close()
    assert local(fired_of(app, "zoned"), NEW_YORK) == expected
    assert local(fired_of(app, "app's"), NEW_YORK) == expected
    assert fired_of(app, "zoned")[1].microsecond < 20_000


@pytest.mark.usefixtures("reset_clock", "no_current_app")
def test_beat_with_its_file_over_a_pause(tmp_path: Path) -> None:
    """Beat's default scheduler keeps schedules in its file, in their app's zone, and catches up once after a pause."""
    Clock.now = datetime(2026, 3, 2, tzinfo=SEOUL)
    routes: dict[str, dict[str, object]] = {
        "at": {"at": time(9)},
        "crontab": {"crontab": Crontab(hour=9)},
        "interval": {"interval": timedelta(hours=20)},
    }
    fired = []
    for until in (datetime(2026, 3, 3, tzinfo=SEOUL), datetime(2026, 3, 6, 12, tzinfo=SEOUL)):
        app = make_beat_app(routes, timezone="Asia/Seoul")
        scheduler = RecordingPersistentScheduler(app=app, schedule_filename=str(tmp_path / "beat"))
        run_beat(scheduler, until)
        scheduler.close()
        fired += app.fired
        Clock.now = datetime(2026, 3, 5, 15, tzinfo=SEOUL)
    daily = ["Mon 02 09:00:00", "Thu 05 15:00:00", "Fri 06 09:00:00"]
    assert local([moment for name, moment in fired if name == "at"], SEOUL) == daily
    assert local([moment for name, moment in fired if name == "crontab"], SEOUL) == daily
    intervals = ["Mon 02 20:00:00", "Thu 05 15:00:00", "Fri 06 11:00:00"]
    assert local([moment for name, moment in fired if name == "interval"], SEOUL) == intervals


ROUTES: list[dict[str, object]] = [
    {"at": time(9, 30, 5)},
    {"at": time(9, tzinfo=NEW_YORK)},
    {"crontab": Crontab(weekday=Weekday.MONDAY, hour=(1, 2))},
    {"interval": timedelta(minutes=5)},
]


@pytest.mark.parametrize("route", ROUTES)
def test_schedule_survives_pickle_and_shelve(route: dict[str, object], tmp_path: Path) -> None:
    """A schedule comes back from pickle, copy and a shelve file as itself, with its clock, also a second time."""
    schedule = convert(**route)
    schedule.nowfun = read_clock
    with shelve.open(str(tmp_path / "schedule")) as store:
        store["entry"] = schedule
    with shelve.open(str(tmp_path / "schedule")) as store:
        stored = store["entry"]
    for again in (stored, pickle.loads(pickle.dumps(stored)), copy.copy(schedule)):
        assert type(again) is type(schedule)
        assert again == schedule
        assert again.nowfun is read_clock


@pytest.mark.parametrize("route", ROUTES)
def test_beats_file_holds_no_password(route: dict[str, object]) -> None:
    """What beat writes about a schedule has nothing of the app but its timezone, let alone the broker's password."""
    app = Celery("test", broker="amqp://user:s3cret@broker//", set_as_current=False)
    assert b"s3cret" not in pickle.dumps(convert(app, **route))
    assert pickle.loads(pickle.dumps(convert(app, **route))).app is not app


@pytest.mark.usefixtures("no_current_app")
@pytest.mark.parametrize("route", ROUTES)
def test_current_app_is_not_asked(route: dict[str, object]) -> None:
    """Neither a new schedule, nor one that beat has read back and bound to None, asks the process's current app."""
    schedule = convert(make_app(beat_cron_starting_deadline=60), **route)
    for each in (schedule, pickle.loads(pickle.dumps(schedule))):
        each.app = None
        each.is_due(each.now())
        each.remaining_estimate(each.now())


@pytest.mark.parametrize("route", [{"at": time(9)}, {"crontab": Crontab(hour=9)}])
def test_two_apps_in_one_process(route: dict[str, object]) -> None:
    """Each of two apps' schedules keeps to its own zone and deadline, fresh and after beat has read it back."""
    now = datetime(2026, 3, 1, 0, 0, 30, tzinfo=UTC)
    for zone, deadline_s, is_due, wait_s in (("Asia/Seoul", 60, True, 86370), ("Asia/Seoul", 10, False, 86370),
                                             ("UTC", None, False, 9 * 3600 - 30)):  # fmt: skip
        app = make_app(beat_cron_starting_deadline=deadline_s)
        app.conf.timezone = zone
        schedule = convert(app, **route)
        for each in (schedule, pickle.loads(pickle.dumps(schedule))):
            each.nowfun = lambda: now
            assert each.is_due(now - timedelta(hours=1)) == (is_due, wait_s)


def test_equality_of_daily_schedules() -> None:
    """Schedules are equal by time and zone, unequal to other kinds, and equal ones have equal hashes."""
    named = DailyAt(time(9, tzinfo=timezone(timedelta(0), "named")))
    assert named == DailyAt(time(9, tzinfo=UTC))
    assert hash(named) == hash(DailyAt(time(9, tzinfo=UTC)))
    assert DailyAt(time(9)) == DailyAt(time(9, fold=1))
    assert DailyAt(time(9)) != DailyAt(time(9, 0, 1))
    assert DailyAt(time(9)) != DailyAt(time(9, tzinfo=NEW_YORK))
    assert DailyAt(time(9, tzinfo=SEOUL)) != DailyAt(time(9, tzinfo=NEW_YORK))
    assert DailyAt(time(9)) != crontab(hour=9, minute=0)
    assert crontab(hour=9, minute=0) != DailyAt(time(9))


def test_repr_of_daily_schedules() -> None:
    """The repr, which beat logs, names time and zone."""
    assert repr(DailyAt(time(9, 30))) == "<daily at: 09:30:00>"
    assert repr(DailyAt(time(9, tzinfo=SEOUL))) == "<daily at: 09:00:00 Asia/Seoul>"


def test_module_loads_neither_worker_nor_beat() -> None:
    """Importing the module loads no worker and no beat."""
    code = "import sys, spakky.plugins.celery.schedule; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "celery.schedules" in loaded
    assert not {"celery.worker", "celery.beat", "spakky.plugins.celery.worker"} & set(loaded)


INVALID: list[tuple[dict[str, object], str, str]] = [
    ({"interval": timedelta(0)}, "interval", "timedelta(0)"),
    ({"interval": timedelta(seconds=-1)}, "interval", "seconds=86399"),
    ({"interval": 30}, "interval", "30"),
    ({"at": "09:00"}, "at", "'09:00'"),
    ({"at": datetime(2026, 1, 1, tzinfo=UTC)}, "at", "2026"),
    ({"crontab": "0 9 * * *"}, "crontab", "'0 9 * * *'"),
    ({"crontab": Crontab(hour=25)}, "crontab.hour", "25"),
    ({"crontab": Crontab(hour=-1)}, "crontab.hour", "-1"),
    ({"crontab": Crontab(hour=24)}, "crontab.hour", "24"),
    ({"crontab": Crontab(minute=-1)}, "crontab.minute", "-1"),
    ({"crontab": Crontab(month=0)}, "crontab.month", "0"),  # type: ignore[arg-type]
    ({"crontab": Crontab(hour=True)}, "crontab.hour", "True"),
    ({"crontab": Crontab(hour="9")}, "crontab.hour", "'9'"),  # type: ignore[arg-type]
    ({"at": timedelta(hours=9)}, "at", "timedelta"),
    ({"interval": True}, "interval", "True"),
    ({"crontab": Crontab(hour=(9, True))}, "crontab.hour", "(9, True)"),  # type: ignore[arg-type]
    ({"crontab": Crontab(hour=(9, "10"))}, "crontab.hour", "(9, '10')"),  # type: ignore[arg-type]
    ({"crontab": Crontab(hour=[9, 10])}, "crontab.hour", "[9, 10]"),  # type: ignore[arg-type]
    ({"crontab": Crontab(weekday="mon")}, "crontab.weekday", "'mon'"),  # type: ignore[arg-type]
    ({"crontab": Crontab(weekday=-1)}, "crontab.weekday", "-1"),  # type: ignore[arg-type]
    ({"crontab": Crontab(day=False)}, "crontab.day", "False"),
    ({"crontab": Crontab(month=1.0)}, "crontab.month", "1.0"),  # type: ignore[arg-type]
    ({"crontab": Crontab(month=())}, "crontab.month", "()"),
    ({"crontab": Crontab(hour=())}, "crontab.hour", "()"),  # type: ignore[arg-type]
    ({"crontab": Crontab(minute=())}, "crontab.minute", "()"),  # type: ignore[arg-type]
    ({"crontab": Crontab(minute=60)}, "crontab.minute", "60"),
    ({"crontab": Crontab(minute=1.5)}, "crontab.minute", "1.5"),  # type: ignore[arg-type]
    ({"crontab": Crontab(minute=(0, 60))}, "crontab.minute", "(0, 60)"),  # type: ignore[arg-type]
    ({"crontab": Crontab(day=0)}, "crontab.day", "0"),
    ({"crontab": Crontab(day=32)}, "crontab.day", "32"),
    ({"crontab": Crontab(day=())}, "crontab.day", "()"),
    ({"crontab": Crontab(month=13)}, "crontab.month", "13"),  # type: ignore[arg-type]
    ({"crontab": Crontab(weekday=7)}, "crontab.weekday", "7"),  # type: ignore[arg-type]
    ({"crontab": Crontab(weekday=())}, "crontab.weekday", "()"),
    ({"crontab": Crontab(month=Month.FEBRUARY, day=30)}, "crontab.day", "30"),
    ({"crontab": Crontab(month=(Month.APRIL, Month.JUNE), day=31)}, "crontab.day", "31"),
]


@pytest.mark.parametrize(("route", "field", "value"), INVALID)
def test_refused(route: dict[str, object], field: str, value: str) -> None:
    """What cannot be kept is refused, naming handler, method, field and value, and what would be valid."""
    with pytest.raises(InvalidScheduleRouteError) as caught:
        convert(**route)
    error = caught.value
    assert (error.handler, error.method, error.field) == ("pkg.Handler", "run", field)
    assert value in error.value
    assert "pkg.Handler.run" in str(error)
    assert value in str(error)
    assert error.expected.startswith("Give ")


@pytest.mark.parametrize(("at", "interval"), [(None, None), (time(9), timedelta(days=1))])
def test_route_with_none_or_several_is_refused(at: time | None, interval: timedelta | None) -> None:
    """A route that was changed to say nothing, or two things, is refused."""
    route = ScheduleRoute(at=time(9))
    route.at, route.interval = at, interval
    with pytest.raises(InvalidScheduleRouteError, match="exactly one") as caught:
        to_celery_schedule(route, handler="pkg.Handler", method="run", app=make_app())
    assert (caught.value.handler, caught.value.method, caught.value.field) == ("pkg.Handler", "run", "schedule")


def test_leap_day_is_kept() -> None:
    """February 29 does come, in the next leap year."""
    schedule = convert(crontab=Crontab(month=Month.FEBRUARY, day=29))
    now = datetime(2026, 3, 1, tzinfo=UTC)
    schedule.nowfun = lambda: now
    assert now + schedule.remaining_estimate(now) == datetime(2028, 2, 29, tzinfo=UTC)


def test_smallest_values_are_kept() -> None:
    """The ends of every range are valid, and so is an interval of one microsecond."""
    convert(crontab=Crontab(month=Month.JANUARY, day=1, weekday=Weekday.MONDAY, hour=0, minute=0))
    convert(crontab=Crontab(month=Month.DECEMBER, day=31, weekday=Weekday.SUNDAY, hour=23, minute=59))
    assert convert(interval=timedelta(microseconds=1)).run_every == timedelta(microseconds=1)
