"""Users, passwords and roles: reads the file of ``--users``, and hashes passwords with argon2."""

from __future__ import annotations

import getpass
import hmac
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import BadInput, need

AUTH = "HISTOSEEK_UI_AUTH"
Role = Literal["reader", "editor"]
READER: Role = "reader"
EDITOR: Role = "editor"
ROLES: tuple[Role, ...] = (READER, EDITOR)
HASH = "$argon2id$"
HASH_BYTES = 32
"""Length of an argon2 hash in bytes; a truncated line has fewer."""
TAKEN = frozenset({"token", "-"})
"""Reserved names: the audit log uses them for other purposes."""
EXPECTED = "expected user:HASH or user:HASH:ROLE, with HASH from `histoseek ui --hash-password`"


@dataclass(frozen=True)
class Users:
    """Who may log in.

    Attributes:
        secrets: password, or its argon2 hash, by user.
        roles: role by user.
        notes: messages to print at the start.
    """

    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    roles: dict[str, Role] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_users(path: Path | None) -> Users:
    """Read the users of ``HISTOSEEK_UI_AUTH`` and of a file.

    Args:
        path: lines ``user:HASH``, ``user:HASH:ROLE`` or ``user:password``; None for no file.

    Raises:
        BadInput: the file cannot be read, other users can read it, or a line is invalid.
        MissingPart: a password is hashed, but argon2 is not installed.
    """
    secrets: dict[str, str] = {}
    roles: dict[str, Role] = {}
    if given := os.environ.get(AUTH):
        problem = f"{AUTH} is not of the form user:password; correct or unset it"
        user, secret, role = _line(given, AUTH, problem)
        secrets[user], roles[user] = secret, role or EDITOR
    if path is None:
        return Users(secrets, roles)
    listed: dict[str, tuple[str, Role | None]] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"--users {path}, line {number}"
        user, secret, role = _line(line, where, f"{where}: {EXPECTED}")
        if user in listed:
            raise BadInput(f"{where}: user {user!r} is listed twice; remove one of the lines")
        listed[user] = secret, role
    if not listed:
        raise BadInput(f"--users {path} names no user; {EXPECTED}")
    notes = [
        f"--users {path} and {AUTH} both name {user!r}; the file's password and role are used"
        for user in secrets
        if user in listed
    ]
    notes += _notes(path, listed)
    secrets |= {user: secret for user, (secret, _) in listed.items()}
    roles |= {user: role or EDITOR for user, (_, role) in listed.items()}
    return Users(secrets, roles, tuple(notes))


def _notes(path: Path, listed: dict[str, tuple[str, Role | None]]) -> list[str]:
    """Return warnings about a file: plain passwords, and users without a role."""
    notes = []
    if plain := [user for user, (secret, _) in listed.items() if not secret.startswith(HASH)]:
        notes.append(
            f"--users {path}: the passwords of {_named(plain)} are in plain text; replace each by the "
            "output of `histoseek ui --hash-password`"
        )
    if no_role := [user for user, (_, role) in listed.items() if role is None]:
        notes.append(
            f"--users {path}: no role for {_named(no_role)}: they are editors and may change the atlas; "
            "write user:HASH:reader for users who may only search and view"
        )
    return notes


def _named(users: list[str]) -> str:
    shown = ", ".join(users[:10])
    return shown if len(users) <= 10 else f"{shown} and {len(users) - 10} more"


def _lines(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--users {path} cannot be read ({error}); check the path") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadInput(f"--users {path} can be read by other users; run: chmod 600 {path}")
    return lines


def _line(text: str, where: str, otherwise: str) -> tuple[str, str, Role | None]:
    """Return user, secret and role of a line; errors never contain the secret."""
    user, _, secret = text.partition(":")
    if not user or not secret:
        raise BadInput(otherwise)
    if user in TAKEN:
        raise BadInput(f"{where}: the user name {user!r} is reserved; choose another")
    if secret.startswith(HASH):
        secret, colon, role = secret.partition(":")
        if colon and role not in ROLES:
            raise BadInput(f"{where}: the role is {role[:50]!r}; expected reader or editor")
        _check_hash(secret, where)
        return user, secret, READER if role == READER else EDITOR if colon else None
    if re.match(r"\$[0-9a-z]+\$", secret):
        raise BadInput(f"{where}: the hash is not argon2id; {EXPECTED}")
    if secret.endswith((":reader", ":editor")):
        raise BadInput(
            f"{where}: a role needs a hashed password, because a plain one may contain colons; {EXPECTED}"
        )
    return user, secret, None


# -- passwords --------------------------------------------------------------------------------------


def _check_hash(text: str, where: str) -> None:
    argon2 = need("argon2", "ui")
    try:
        complete = argon2.extract_parameters(text).hash_len == HASH_BYTES
    except (argon2.exceptions.InvalidHashError, ValueError):
        complete = False
    if not complete:
        raise BadInput(f"{where}: the hash is truncated or changed; {EXPECTED}")


def hash_password(password: str) -> str:
    """Return the argon2id hash of a password, with a new salt.

    Raises:
        BadInput: the password is empty or longer than 1,000 characters.
        MissingPart: argon2 is not installed.
    """
    if not 0 < len(password) <= 1000:
        raise BadInput(f"the password has {len(password)} characters; expected 1 to 1,000")
    return str(need("argon2", "ui").PasswordHasher().hash(password))


def matches(secret: str, password: str) -> bool:
    """Whether a password matches a secret; a hash takes a tenth of a second or more."""
    if not secret.startswith(HASH):
        return hmac.compare_digest(secret.encode(), password.encode())
    argon2 = need("argon2", "ui")
    try:
        return bool(argon2.PasswordHasher().verify(secret, password))
    except argon2.exceptions.Argon2Error:
        return False


def ask_password() -> str:
    """Return a password, typed twice without echo or read from the first line of standard input.

    Raises:
        BadInput: the two differ.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if password != getpass.getpass("Repeat the password: "):
        raise BadInput("the two passwords differ; run the command again")
    return password
