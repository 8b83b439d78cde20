"""Parquet files whose metadata lies about sizes."""

from __future__ import annotations


def varint(number):
    """A number as thrift's compact protocol writes it."""
    number, out = number << 1, bytearray()  # Zigzag, of what is not negative.
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def forge(path, numbers, encodings=None):
    """Replaces 64-bit numbers of a file's footer, in whichever field they stand.

    Args:
        path: The file.
        numbers: Old -> new.
        encodings: Bytes of a list of encodings -> others.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    for old, new in numbers.items():
        assert footer.count(b"\x16" + varint(old)), old  # A field right behind the one before.
        footer = footer.replace(b"\x16" + varint(old), b"\x16" + varint(new))
    for old, new in (encodings or {}).items():
        assert footer.count(old), old
        footer = footer.replace(old, new)
    path.write_bytes(data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + data[-4:])
