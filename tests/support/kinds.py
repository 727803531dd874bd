"""One value of each kind that an argument and a result may have, with its annotation."""

import enum
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, TypedDict
from uuid import UUID

from pydantic import BaseModel, Field, HttpUrl, SecretBytes, SecretStr

from spakky.plugins.celery.codec import Sensitive

AccountId = NewType("AccountId", int)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Tag(enum.StrEnum):
    NEW = "new"


class Level(enum.IntEnum):
    HIGH = 3


class Place(NamedTuple):
    row: int
    seat: str = "A"


class Options(TypedDict):
    copies: int
    stamp: NotRequired[bytes]


@dataclass
class Line:
    title: str
    price: Decimal
    photo: bytes = b""
    parts: "list[Line]" = field(default_factory=list)


class Invoice(BaseModel):
    number: UUID
    lines: list[Line]
    token: SecretStr = SecretStr("")
    raw: bytes = b""
    parent: "Invoice | None" = None
    extra: Any = None


class Page[T](BaseModel):
    items: list[T]


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    name: str


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


type Tree = dict[str, "Tree"] | int

ID = UUID("00000000-0000-4000-8000-000000000001")
LINE = Line("tea", Decimal("1.10"), b"\xff\x00", [Line("leaf", Decimal(0))])
INVOICE = Invoice(number=ID, lines=[LINE], token=SecretStr("s3cret"), raw=b"\xfe", parent=Invoice(number=ID, lines=[]))
BERLIN = timezone(timedelta(hours=1))

KINDS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "bool": (bool, True),
    "int": (int, 2**53),
    "float": (float, 0.1),
    "infinity": (float, float("-inf")),
    "str": (str, "Grüße"),
    "bytes": (bytes, bytes(range(256))),
    "datetime": (datetime, datetime(2026, 1, 2, 3, 4, 5, 6)),  # noqa: DTZ001  # a naive one is a kind of its own
    "aware datetime": (datetime, datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=BERLIN)),
    "date": (date, date(2026, 1, 2)),
    "time": (time, time(1, 2, 3, 4)),
    "timedelta": (timedelta, timedelta(days=-1, microseconds=1)),
    "decimal": (Decimal, Decimal("1.10")),
    "uuid": (UUID, ID),
    "path": (Path, Path("/tmp/file")),
    "complex": (complex, 1 + 2j),
    "fraction": (Fraction, Fraction(1, 3)),
    "address": (IPv4Address, IPv4Address("127.0.0.1")),
    "url": (HttpUrl, HttpUrl("https://example.org/")),
    "enum": (Colour, Colour.RED),
    "str enum": (Tag, Tag.NEW),
    "int enum": (Level, Level.HIGH),
    "literal": (Literal["a", 1], 1),
    "new type": (AccountId, AccountId(5)),
    "constrained": (Annotated[int, Field(gt=3)], 4),
    "list": (list[date], [date(2026, 1, 2)]),
    "sequence": (Sequence[int], [1, 2]),
    "deque": (deque[int], deque([1, 2])),
    "tuple": (tuple[int, str, UUID], (1, "a", ID)),
    "long tuple": (tuple[Decimal, ...], (Decimal("1.0"), Decimal(2))),
    "set": (set[UUID], {ID}),
    "frozenset": (frozenset[Tag], frozenset({Tag.NEW})),
    "dict": (dict[str, bytes], {"a": b"\xff"}),
    "mapping": (Mapping[str, date], {"a": date(2026, 1, 2)}),
    "int keys": (dict[int, str], {1: "a"}),
    "uuid keys": (dict[UUID, int], {ID: 1}),
    "date keys": (dict[date, int], {date(2026, 1, 2): 1}),
    "enum keys": (dict[Colour, int], {Colour.BLUE: 1}),
    "named tuple": (Place, Place(3, "B")),
    "typed dict": (Options, {"copies": 2, "stamp": b"\xff"}),
    "dataclass": (Line, LINE),
    "model": (Invoice, INVOICE),
    "list of models": (list[Invoice], [INVOICE]),
    "generic model": (Page[Line], Page[Line](items=[LINE])),
    "recursive alias": (Tree, {"a": {"b": 1}}),
    "optional": (date | None, None),
    "union": (int | Decimal | None, Decimal(2)),
    "date or datetime": (date | datetime, datetime(2026, 1, 2, tzinfo=UTC)),
    "union of models": (Cat | Dog, Dog(name="Rex")),
    "discriminated union": (Annotated[Cat | Dog, Field(discriminator="kind")], Cat(name="Tom")),
    "secret": (SecretStr, SecretStr("s3cret")),
    "secret bytes": (SecretBytes, SecretBytes(b"s3cret\xff")),
    "sensitive": (Annotated[str, Sensitive()], "s3cret"),
    "any": (Any, {"a": [1, 2.5, None, True, "x"]}),
    "plain dict": (dict[str, Any], {"a": [1]}),
}
"""Annotation and value by the name of the kind."""
