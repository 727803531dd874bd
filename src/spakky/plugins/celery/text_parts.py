"""Owns text with gaps, for what differs between two messages; knows nothing of messages."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

__all__ = ["TextParts"]


class TextParts[T: (str, bytes)]:
    """Text around named gaps."""

    def __init__(self, texts: Sequence[T], names: Sequence[str]) -> None:
        """Keep both.

        Args:
            texts: The text before, between and after the gaps.
            names: The name of each gap; several may have one.
        """
        self._texts: Sequence[T] = texts
        self._names = names

    def settle(self, values: Mapping[str, T]) -> "TextParts[T]":
        """Fill some of the gaps, for good."""
        texts, names = [self._texts[0]], []
        for name, text in zip(self._names, self._texts[1:], strict=True):
            value = values.get(name)
            if value is None:
                names.append(name)
                texts.append(text)
            else:
                texts[-1] = texts[-1] + value + text
        return TextParts(texts, names)

    def to_filler(self, places: Mapping[str, int]) -> Callable[[tuple[T, ...]], T]:
        """Make what fills all gaps, over and over.

        Args:
            places: For each name where its value stands in what the filler is given.
        """
        empty: T = self._texts[0][:0]
        join: Any = empty.join  # checkers do not see that it is of the same type
        around: list[T] = [part for text in self._texts for part in (text, empty)][:-1]
        wanted = [places[name] for name in self._names]
        first = min(wanted, default=0)
        arrange = itemgetter(*wanted) if len(wanted) > 1 else itemgetter(slice(first, first + len(wanted)))

        def fill(values: tuple[T, ...]) -> T:
            parts = around.copy()
            parts[1::2] = arrange(values)
            text: T = join(parts)
            return text

        return fill
