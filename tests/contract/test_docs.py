"""The documentation names what there is."""

import re
from pathlib import Path

from spakky.plugins.celery.common.config import CeleryConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_is_documented() -> None:
    """The table of docs/settings.md has one row per setting, in the order of the class, and no other."""
    rows = re.findall(r"^\| `SPAKKY_CELERY__(\w+)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE)
    assert rows == [name.upper() for name in CeleryConfig.model_fields]


def test_links_lead_somewhere() -> None:
    """Every relative link of the documentation names a file that is there."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
