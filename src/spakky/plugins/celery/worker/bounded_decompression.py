"""Owns how far a worker decompresses a message: kombu does it before anybody can look, however large the body becomes.

kombu's decoders are one set for the whole process, so stored results that a worker reads are bounded as well. Brotli,
where it is installed, is not.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final

from kombu.compression import get_encoder, register

__all__ = ["BodyTooLargeError", "bound_decompression"]

_LZMA_MEMORY: Final = 256 * 1024 * 1024
"""Its strongest preset needs 65 MiB; a message can ask for 4 GiB."""

_DECOMPRESSORS: Final[dict[str, Callable[[], Any]]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY),
}


class BodyTooLargeError(ValueError):
    """Raised in kombu for a body that is larger uncompressed than a worker takes; its argument is the limit."""


def bound_decompression(limit: int) -> None:
    """Have kombu give up on a body when it has so many bytes.

    Args:
        limit: Most bytes that a body may have.
    """
    for content_type, make in _DECOMPRESSORS.items():
        encoder, _ = get_encoder(content_type)
        register(encoder, _bounded(make, limit), content_type)


def _bounded(make: Callable[[], Any], limit: int) -> Callable[[bytes], bytes]:
    def decompress(compressed: bytes) -> bytes:
        decompressor = make()
        body: bytes = decompressor.decompress(compressed, limit + 1)
        if len(body) > limit:
            raise BodyTooLargeError(limit)
        if not decompressor.eof:
            raise EOFError
        return body

    return decompress
