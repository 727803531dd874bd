"""Owns how the properties of an AMQP message are read that has them like one before it. Reads no frame.

py-amqp reads a table item by item, which is a fifth of all that an empty task costs a worker. Messages of one version
of a producer differ in a dozen texts among those items, and all else is, byte for byte, the same.
"""

from struct import Struct, error
from typing import Any, Final, NamedTuple

from amqp.serialization import decode_properties_basic

__all__ = ["PROPERTIES_AT", "PropertyReader"]

PROPERTIES_AT: Final = 12
"""Where properties begin in the header of a content: class, weight and size of the body are before them."""

_MOST_SHAPES: Final = 8
_MOST_LEARNED: Final = 256
"""After so many misses shapes are learned of some messages only: senders may choose names and numbers at will."""

_SOME: Final = 64
"""One in so many messages. After as many misses in a row no more have shapes tried, which takes its time, too."""

_TEXT: Final = ord("S")
_FIXED_SIZES: Final = {
    ord(kind): size for kind, size in zip("VtbBUusIiflLdTD", map(int, "011122244488885"), strict=True)
}
_COUNTED: Final = frozenset(b"xFA")
_SIZES_OF_FLAGS: Final = {0x1000: 1, 0x0800: 1, 0x0040: 8}
"""Delivery mode, priority and timestamp."""
_NAMES_OF_FLAGS: Final = {
    0x0400: "correlation_id",
    0x0200: "reply_to",
    0x0100: "expiration",
    0x0080: "message_id",
    0x0020: "type",
    0x0010: "user_id",
    0x0008: "app_id",
    0x0004: "cluster_id",
}
_TABLE: Final = 0x2000
_BEFORE_TABLE: Final = (0x8000, 0x4000)
"""Content type and encoding."""

_read_flags: Final = Struct(">H").unpack_from
_read_size: Final = Struct(">I").unpack_from
_SIZE: Final = 4


class PropertyReader:
    """Reads properties as py-amqp does, to the same values."""

    def __init__(self) -> None:
        self._shapes: list[_Shape] = []
        """Those that were of use last first."""
        self._misses = 0
        """How many messages no shape was found for."""
        self._misses_in_a_row = 0

    def read(self, content: bytes) -> dict[str, Any]:
        """Read those of the header of a content.

        Raises:
            Exception: What py-amqp does, of any type, for those that it cannot read.
        """
        if self._misses_in_a_row < _SOME or self._misses_in_a_row % _SOME == 0:
            for place, shape in enumerate(self._shapes):
                found = shape.read(content)
                if found is not None:
                    if place:
                        self._shapes.insert(0, self._shapes.pop(place))
                    self._misses_in_a_row = 0
                    return found
        self._misses += 1
        self._misses_in_a_row += 1
        properties: dict[str, Any] = decode_properties_basic(content, PROPERTIES_AT)[0]
        self._learn(content, properties)
        return properties

    def _learn(self, content: bytes, properties: dict[str, Any]) -> None:
        if self._misses > _MOST_LEARNED and self._misses % _SOME:
            return
        shape = _Shape.of(content, properties)
        if shape is not None:
            self._shapes[_MOST_SHAPES - 1 :] = [shape]


class _Text(NamedTuple):
    """A text that messages differ in, and what is before it and its size."""

    before: bytes
    length: int
    name: str

    @classmethod
    def of(cls, before: bytes, name: str) -> "_Text":
        return cls(before, len(before), name)


class _Shape(NamedTuple):
    """Properties, but for their texts."""

    begin: bytes
    """From the flags to the size of the table."""
    texts: list[_Text]
    table_end: bytes
    short_texts: list[_Text]
    end: bytes
    headers: dict[str, Any]
    containers: list[str]
    """Names of headers that each message has a copy of."""
    properties: dict[str, Any]

    @classmethod
    def of(cls, content: bytes, properties: dict[str, Any]) -> "_Shape | None":
        """Give that of properties which py-amqp has read; None where it is not known to read them alike."""
        try:
            shape = _Walk(content).walk(properties)
        except (error, KeyError, ValueError, IndexError):
            return None
        return shape if shape is not None and shape.read(content) == properties else None

    def read(self, content: bytes) -> dict[str, Any] | None:
        """Read the properties of another message; None where they are not of this shape."""
        if not content.startswith(self.begin, PROPERTIES_AT):
            return None
        at = PROPERTIES_AT + len(self.begin)
        headers, properties = self.headers.copy(), self.properties.copy()
        try:
            (size,) = _read_size(content, at)
            at += _SIZE
            table_end = at + size
            for before, length, name in self.texts:
                end = at + length
                if content[at:end] != before:
                    return None
                (size,) = _read_size(content, end)
                end += _SIZE
                at = end + size
                headers[name] = content[end:at].decode()
            if at + len(self.table_end) != table_end or content[at:table_end] != self.table_end:
                return None
            at = table_end
            for before, length, name in self.short_texts:
                end = at + length
                if content[at:end] != before:
                    return None
                at = end + 1 + content[end]
                properties[name] = content[end + 1 : at].decode()
        except (error, IndexError, UnicodeDecodeError):
            return None
        for name in self.containers:
            headers[name] = headers[name].copy()
        properties["application_headers"] = headers
        return properties if content[at:] == self.end else None


class _Walk:
    """Finds the texts among properties."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._begin = self._at = PROPERTIES_AT

    def walk(self, properties: dict[str, Any]) -> _Shape | None:
        headers: dict[str, Any] = properties.get("application_headers", {})
        containers = {name: value for name, value in headers.items() if isinstance(value, list | dict)}
        if not headers or any(map(_is_deep, containers.values())):
            return None
        (flags,) = _read_flags(self._content, self._at)
        self._at += 2
        for flag in _BEFORE_TABLE:
            if flags & flag:
                self._at += 1 + self._content[self._at]
        begin = self._cut()
        texts = self._walk_table()
        if any(text.name in containers for text in texts):
            return None  # of a name that occurs twice the last value counts
        table_end = self._cut()
        short_texts = []
        for flag in sorted(_SIZES_OF_FLAGS | _NAMES_OF_FLAGS, reverse=True):
            if flags & flag and flag in _SIZES_OF_FLAGS:
                self._at += _SIZES_OF_FLAGS[flag]
            elif flags & flag:
                short_texts.append(_Text.of(self._cut(), _NAMES_OF_FLAGS[flag]))
                self._skip(1 + self._content[self._at])
        own_headers = headers | {name: value.copy() for name, value in containers.items()}
        return _Shape(begin, texts, table_end, short_texts, self._cut(), own_headers, list(containers), {**properties})

    def _walk_table(self) -> list[_Text]:
        texts = []
        end = self._at + _SIZE + self._size
        self._skip(_SIZE)
        while self._at < end:
            name_at = self._at + 1
            self._at = name_at + self._content[self._at]
            name = self._content[name_at : self._at].decode()
            kind = self._content[self._at]
            self._at += 1
            if kind == _TEXT:
                texts.append(_Text.of(self._cut(), name))
                self._skip(_SIZE + self._size)
            else:
                self._at += _SIZE + self._size if kind in _COUNTED else _FIXED_SIZES[kind]
        return texts

    @property
    def _size(self) -> int:
        """The size that stands here."""
        (size,) = _read_size(self._content, self._at)
        return int(size)

    def _cut(self) -> bytes:
        """Give what is between the last cut and here."""
        found = self._content[self._begin : self._at]
        self._begin = self._at
        return found

    def _skip(self, size: int) -> None:
        """Leave something out of what is cut."""
        self._begin = self._at = self._at + size


def _is_deep(value: list[Any] | dict[str, Any]) -> bool:
    """Whether a copy of a container has containers of the other."""
    return any(isinstance(one, list | dict) for one in (value.values() if isinstance(value, dict) else value))
