"""Checks passwords, limits failed attempts, and caches recent successes.

Argon2 is slow by design. It runs on two separate threads, and a correct password is cached for minutes
under a keyed hash, so that neither other requests nor the same user wait for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor

from .policy import Access, Claim, claim_of
from .proxies import parsed
from .users import HASH

FAILURES = 10
"""Wrong passwords per minute for one user from one address; after that, this user and address must wait."""
ADDRESS_FAILURES = 100
"""Wrong passwords per minute from one address, for any users."""
FAILURES_S = 60.0
COUNTED = 10_000
"""Maximum number of users and addresses for which failures are counted."""
REMEMBER_S = 300.0
REMEMBERED = 1_024
THREADS = 2
WAITING = 64
"""Maximum number of passwords that wait for argon2."""


class MustWait(Exception):
    """The password is not checked now; the client must wait."""

    def __init__(self, text: str, seconds: int) -> None:
        """Store the reason and the seconds to wait."""
        super().__init__(text)
        self.seconds = seconds


class Failures:
    """Counts failures per minute and key, for a bounded number of keys."""

    def __init__(self, most: int, keys: int = COUNTED) -> None:
        """Allow ``most`` failures per minute and key; above ``keys`` keys, drop the oldest."""
        self._most, self._keys = most, keys
        self._times: OrderedDict[bytes, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._times)

    def full(self, key: bytes) -> bool:
        """Whether a key has reached its limit."""
        times = self._times.get(key)
        if times is None or len(times) < self._most:
            return False
        return time.monotonic() - times[0] < FAILURES_S

    def add(self, key: bytes) -> None:
        """Count a failure."""
        self._times.setdefault(key, deque(maxlen=self._most)).append(time.monotonic())
        self._times.move_to_end(key)
        while len(self._times) > self._keys:
            self._times.popitem(last=False)

    def take_back(self, key: bytes) -> None:
        """Uncount the last failure."""
        times = self._times.get(key)
        if times:
            times.pop()

    def clear(self, key: bytes) -> None:
        """Drop a key's failures."""
        self._times.pop(key, None)


class Logins:
    """Authenticates ``Authorization`` headers, and slows down guessing."""

    def __init__(self, access: Access) -> None:
        """Check against these users and this token."""
        self._access = access
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._by_user = Failures(FAILURES)
        self._by_address = Failures(ADDRESS_FAILURES)
        self._right: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._slow = any(secret.startswith(HASH) for secret in access.users.values())
        self._pool = ThreadPoolExecutor(THREADS, "passwords")
        self._checks: dict[bytes, Future[str | None]] = {}

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def who(self, header: str, address: str) -> str | None:
        """Return the user that a header authenticates; None if it is wrong.

        A wrong password counts for its user at this address, and for the address. Neither count delays a
        correct password from another address.

        Args:
            header: ``Authorization``, not empty.
            address: the client's address.

        Raises:
            MustWait: there were too many wrong passwords, or there are too many at once.
        """
        claim = claim_of(header)
        network = _network(address)
        user_key = self._hash("user", claim.user if claim else "", network)
        address_key = self._hash("address", network)
        right_key = self._hash("right", header)
        check_key = self._hash("check", header, network)
        with self._lock:
            if self._by_user.full(user_key):
                text = "too many wrong passwords for this user from this address; wait a minute"
                raise MustWait(text, 60)
            user, until = self._right.get(right_key, (None, 0.0))
            if user is not None and time.monotonic() < until:
                return user
            check = self._checks.get(check_key)
            if check is None:
                if self._by_address.full(address_key):
                    self._by_user.add(user_key)  # else an attacker could detect cached passwords
                    text = "too many wrong passwords from this address; wait a minute"
                    raise MustWait(text, 60)
                check = self._start(claim, check_key)
                # Counted before the result is known, so that parallel attempts cannot evade the limit.
                self._by_user.add(user_key)
                self._by_address.add(address_key)
        try:
            user = await asyncio.shield(asyncio.wrap_future(check))
        finally:
            with self._lock:
                first = self._checks.pop(check_key, None) is not None
        with self._lock:
            if user is None:
                return None
            self._by_user.clear(user_key)
            if first:
                self._by_address.take_back(address_key)
            self._right[right_key] = user, time.monotonic() + REMEMBER_S
            self._right.move_to_end(right_key)
            while len(self._right) > REMEMBERED:
                self._right.popitem(last=False)
        return user

    def _start(self, claim: Claim | None, key: bytes) -> Future[str | None]:
        """Start a check, on a thread if it needs argon2; equal headers share one check at a time."""
        if claim is not None and self._slow and not claim.bearer:
            if len(self._checks) >= WAITING:
                raise MustWait("too many passwords are being checked; try again in a moment", 1)
            check = self._pool.submit(self._access.check, claim)
        else:
            check = Future()
            check.set_result(self._access.check(claim) if claim else None)
        self._checks[key] = check
        return check

    def _hash(self, *parts: str) -> bytes:
        text = "\0".join(parts).encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text, hashlib.sha256)


def _network(address: str) -> str:
    """Return a client's address, or for IPv6 its /64 network."""
    client = parsed(address)
    if isinstance(client, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((client, 64), strict=False))
    return str(client or address)
