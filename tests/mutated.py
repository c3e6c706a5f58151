"""Real images altered to break a decoder, for uploads."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

KINDS = (
    "flipped", "truncated", "spliced", "header", "bomb", "text", "empty", "noise", "animated",
    "deep", "cmyk", "huge-claim", "zip", "polyglot", "whole", "exif",
)  # fmt: skip


def _png_claiming(width, height):
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _formats(blob):
    picture = Image.open(io.BytesIO(blob)).convert("RGB")
    return [_saved(picture, kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")]


def mutated_uploads(seeds, count, rng):
    """Yield kind and bytes of ``count`` uploads, made from pictures in six formats."""
    pictures = [blob for seed in seeds for blob in _formats(seed)]
    bomb = _saved(Image.new("1", (12_000, 12_000)), "PNG")
    small = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    odd = {
        "bomb": bomb,
        "text": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg>&a;</svg>",
        "empty": b"",
        "animated": _saved(small, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), "red")]),
        "deep": _saved(Image.fromarray(np.zeros((40, 40), np.uint16)), "PNG"),
        "cmyk": _saved(small.convert("CMYK"), "JPEG"),
        "zip": b"PK\x03\x04" + b"\0" * 200,
    }  # fmt: skip
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        blob = bytearray(rng.choice(pictures))
        if kind in odd:
            yield kind, odd[kind]
            continue
        if kind == "flipped":
            for _ in range(rng.randint(1, 30)):
                blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        elif kind == "truncated":
            del blob[rng.randrange(len(blob)) :]
        elif kind == "spliced":
            other = rng.choice(pictures)
            blob = blob[: rng.randrange(len(blob))] + other[rng.randrange(len(other)) :]
        elif kind == "header":
            for place in range(rng.randint(2, 40)):
                blob[place] = rng.randrange(256)
        elif kind == "noise":
            blob = bytearray(rng.randbytes(rng.randint(1, 5000)))
        elif kind == "huge-claim":
            sides = rng.choice(
                [(60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 0), (2**32 - 1,) * 2]
            )
            blob = bytearray(_png_claiming(*sides))
        elif kind == "polyglot":
            blob += b"<script>alert(1)</script>" + odd["zip"]
        elif kind == "exif":
            where = blob.find(b"Exif")
            blob[where + 6 : where + 20] = rng.randbytes(14)
        yield kind, bytes(blob)
