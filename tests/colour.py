"""Colour profiles for tests, computed from primaries and a curve; none contains a vendor's data."""

import struct

import numpy as np

D50 = np.array([0.9642, 1, 0.8249])
D65 = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
DISPLAY_P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]


def _fixed(values):
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)


def _curve(gamma):
    if gamma == "srgb":
        values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(values)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256)) + b"\0\0"


def _put_together(space, tags):
    at = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, blob in tags:
        padded = blob + b"\0" * (-len(blob) % 4)
        table += name + struct.pack(">II", at + len(data), len(padded))
        data += padded
    head = struct.pack(">I4sI4s4s4s", at + len(data), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _fixed(D50) + b"lcms"
    return head.ljust(128, b"\0") + table + data


def _texts(name):
    words = name.encode() + b"\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(words)) + words + b"\0" * 78
    return [(b"desc", described), (b"cprt", b"text\0\0\0\0none\0")]


def _xyz(values):
    return b"XYZ \0\0\0\0" + _fixed(values)


def rgb_profile(primaries, gamma, name):
    """An ICC profile of a display with these primaries, white D65."""
    to_xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    to_xyz = to_xyz * np.linalg.solve(to_xyz, D65)
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD
    columns = (adapt @ to_xyz).T
    tags = [*_texts(name), (b"wtpt", _xyz(D50))]
    tags += [(n, _xyz(c)) for n, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)]
    tags += [(n, _curve(gamma)) for n in (b"rTRC", b"gTRC", b"bTRC")]
    return _put_together(b"RGB ", tags)


def grey_profile(gamma, name):
    """An ICC profile of grey with this gamma."""
    tags = [*_texts(name), (b"wtpt", _xyz(D50)), (b"kTRC", _curve(gamma))]
    return _put_together(b"GRAY", tags)
