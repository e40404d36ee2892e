"""How small general-purpose compressors make a text: the figures that bits per byte stand beside."""

import lzma

import zstandard

ZSTD_LEVEL = 19  # the highest that needs no extra memory to decompress


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Return bits per byte of the text after `xz -9e` and after `zstd -19`, headers included.

    Raises:
        ValueError: the text is empty.
    """
    if not text:
        raise ValueError("compressed_bits_per_byte: got a text of 0 bytes. Allowed: at least 1. Give a longer text.")
    sizes = {
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(text)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
