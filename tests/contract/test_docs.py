"""The documentation names what there is."""

import re
from dataclasses import fields
from pathlib import Path

from spakky.plugins.celery.common.config import CeleryConfig
from spakky.plugins.celery.options import MessageOptions, RetryPolicy, TaskOptions

DOCS = Path(__file__).parents[2] / "docs"
OPTION_TESTS = Path(__file__).parents[1] / "acceptance/test_options.py"


def test_every_setting_is_documented() -> None:
    """The table of docs/settings.md has one row per setting, in the order of the class, and no other."""
    rows = re.findall(r"^\| `SPAKKY_CELERY__(\w+)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert rows == [name.upper() for name in CeleryConfig.model_fields]


def test_links_lead_somewhere() -> None:
    """Every relative link of the documentation names a file that is there."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def rows_of(section: str) -> list[str]:
    """First cells of the table rows in one section of docs/options.md."""
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_every_option_is_documented_and_tested_in_a_worker() -> None:
    """The table of docs/options.md has one row per option, and each row has its test with a real worker."""
    options, _, policy = (DOCS / "options.md").read_text().partition("## RetryPolicy")
    assert rows_of(options) == [*MessageOptions.__annotations__, *own_annotations(TaskOptions)]
    assert rows_of(policy) == [field.name for field in fields(RetryPolicy)]
    tests = re.findall(r"^def test_(\w+)\(worker:", OPTION_TESTS.read_text(), re.MULTILINE)
    assert [row for row in rows_of(options) if row not in tests] == []


def own_annotations(class_: type) -> list[str]:
    return [name for name in class_.__annotations__ if name not in MessageOptions.__annotations__]
