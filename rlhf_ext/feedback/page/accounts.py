"""Who may label from elsewhere: names and hashed passwords in a file, and sessions in memory."""

import hashlib
import json
import os
import secrets
import threading
import time
from pathlib import Path

from ..records import check_name


# RFC 7914's interactive setting: 16 MiB and some 50 ms a try.
_SCRYPT = {"n": 2**14, "r": 8, "p": 1, "maxmem": 2**26}
_MIN_LENGTH = 8
_TRIES, _WINDOW = 10, 300.0


class Accounts:
    """
    Annotators and their passwords, as scrypt hashes in a JSON file that its owner alone can read.

    Args:
        path (`str` or `Path`): the file; made by the first [`set_password`].
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def names(self) -> list[str]:
        """Names of the accounts."""
        return sorted(self._read())

    def set_password(self, name: str, password: str) -> None:
        """
        Add an account, or change its password.

        Raises:
            ValueError: a name that is none, or a password of fewer than 8 characters.
        """
        check_name("name", name)
        if len(password) < _MIN_LENGTH:
            raise ValueError(f"The password of {name!r} has {len(password)} characters; give {_MIN_LENGTH} or more.")
        salt = secrets.token_bytes(16)
        entry = {"salt": salt.hex(), "hash": _hash(password, salt).hex()}
        accounts = self._read() | {name: entry}
        aside = self.path.with_name(f"{self.path.name}.part")
        # Readable by nobody else from the first byte on.
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(accounts, file, indent=1)
        os.replace(aside, self.path)

    def check(self, name: str, password: str) -> bool:
        """Whether name and password belong together. An unknown name takes as long as a wrong password."""
        entry = self._read().get(name)
        salt = bytes.fromhex(entry["salt"]) if entry else bytes(16)
        found = _hash(password, salt)
        return entry is not None and secrets.compare_digest(found, bytes.fromhex(entry["hash"]))

    def _read(self) -> dict[str, dict[str, str]]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}


class Sessions:
    """Logins of this process: a random token per session, of which only the hash is kept. A restart ends them."""

    def __init__(self, seconds: float = 12 * 3600.0):
        self.seconds = seconds
        self._open: dict[str, tuple[str, float]] = {}
        self._failed: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def start(self, name: str) -> str:
        """A new session's token."""
        token, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            self._open = {key: entry for key, entry in self._open.items() if entry[1] > now}
            self._open[_digest(token)] = (name, now + self.seconds)
            self._failed.pop(name, None)
        return token

    def name_of(self, token: str | None) -> str | None:
        """Whose session a token is; `None` for none."""
        entry = self._open.get(_digest(token)) if token else None
        return entry[0] if entry is not None and entry[1] > time.monotonic() else None

    def end(self, token: str | None) -> None:
        """Log out."""
        if token:
            with self._lock:
                self._open.pop(_digest(token), None)

    def may_try(self, name: str) -> bool:
        """Whether a name has not failed too often lately."""
        recent = [moment for moment in self._failed.get(name, []) if moment > time.monotonic() - _WINDOW]
        return len(recent) < _TRIES

    def note_failure(self, name: str) -> None:
        """Count a wrong password."""
        with self._lock:
            if len(self._failed) > 10_000:  # names that somebody made up
                self._failed.clear()
            recent = [moment for moment in self._failed.get(name, []) if moment > time.monotonic() - _WINDOW]
            self._failed[name] = [*recent, time.monotonic()]


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
