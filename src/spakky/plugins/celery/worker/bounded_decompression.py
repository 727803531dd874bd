"""Owns how far a worker decompresses a message: kombu does it before anybody can look, however large the body becomes.

kombu's decoders are one set for the whole process, so stored results that a worker reads are bounded as well. What an
application registers with kombu itself is its own affair.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Final

from kombu.compression import encoders, get_encoder, register

__all__ = ["BodyTooLargeError", "UnboundedCompressionError", "bound_decompression"]

_LZMA_MEMORY: Final = 256 * 1024 * 1024
"""Its strongest preset needs 65 MiB; a message can ask for 4 GiB."""

_ZSTD: Final = "application/zstd"
_BROTLI: Final = "application/x-brotli"
_NO_BOUND: Final = "it is compressed with Brotli, and the installed library cannot stop at a limit: brotli 1.2 can"

_DECOMPRESSORS: Final[dict[str, Callable[[], Any]]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY),
}


class UnboundedCompressionError(ValueError):
    """Raised in kombu for a body that the installed library cannot decompress up to a limit: Brotli before 1.2."""


class BodyTooLargeError(ValueError):
    """Raised in kombu for a body that is larger uncompressed than a worker takes; its argument is the limit."""


def bound_decompression(limit: int) -> None:
    """Have kombu give up on a body when it has so many bytes.

    Args:
        limit: Most bytes that a body may have.
    """
    for content_type, make in (*_DECOMPRESSORS.items(), *_installed()):
        encoder, _ = get_encoder(content_type)
        register(encoder, _bounded(make, limit), content_type)


class _BrotliDecompressor:
    """Brotli's decompressor with the interface of the standard library's."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._inner = make()

    def decompress(self, compressed: bytes, most: int) -> bytes:
        try:
            body: bytes = self._inner.process(compressed, output_buffer_limit=most)
        except TypeError:
            raise UnboundedCompressionError(_NO_BOUND) from None
        return body

    @property
    def eof(self) -> bool:
        return bool(self._inner.is_finished())


def _installed() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Find what kombu has registered because its library is there; each under the names that kombu looks for."""
    known = encoders()
    if _ZSTD in known:
        zstd = _import_first("compression.zstd", "backports.zstd")
        yield _ZSTD, zstd.ZstdDecompressor
    if _BROTLI in known:
        brotli = _import_first("brotli", "brotlicffi")
        yield _BROTLI, lambda: _BrotliDecompressor(brotli.Decompressor)


def _import_first(*names: str) -> Any:
    for name in names[:-1]:
        try:
            return import_module(name)
        except ImportError:
            continue
    return import_module(names[-1])


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
