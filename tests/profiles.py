"""ICC profiles, written by hand: Pillow makes none but sRGB."""

from __future__ import annotations

import struct

WHITE = (0.9642, 1.0, 0.8249)


def profile(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2 with these tags."""
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + bytes(78)
    tags = {**tags, "desc": description, "cprt": b"text\0\0\0\0none\0", "wtpt": xyz(*WHITE)}
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name.encode() + struct.pack(">II", start + len(content), len(tag))
        content += tag
    body = struct.pack(">I", len(tags)) + table + content
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + xyz(*WHITE)[8:]
    return head.ljust(128, b"\0") + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def of_primaries(red, green, blue, exponent: float) -> bytes:
    curves = dict.fromkeys(("rTRC", "gTRC", "bTRC"), gamma(exponent))
    return profile(b"RGB ", rXYZ=xyz(*red), gXYZ=xyz(*green), bXYZ=xyz(*blue), **curves)


ADOBE_RGB = of_primaries(
    (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 563 / 256
)
DISPLAY_P3 = of_primaries((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2)
