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
        self._known: tuple[tuple[int, int, int], dict[str, dict[str, str]]] | None = None

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

    def mark(self, name: str) -> str | None:
        """What a session of the account is good for: another password is another mark, no account is `None`."""
        entry = self._read().get(name)
        return None if entry is None else entry["hash"]

    def _read(self) -> dict[str, dict[str, str]]:
        """What the file says now; asked at every call, so it is read again only where it is another file."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {}
        state = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._known
        if known is None or known[0] != state:
            known = self._known = (state, json.loads(self.path.read_text(encoding="utf-8")))
        return known[1]


class Sessions:
    """Logins of this process: a random token per session, of which only the hash is kept. A restart ends them."""

    def __init__(self, seconds: float = 12 * 3600.0):
        self.seconds = seconds
        self._open: dict[str, tuple[str, str | None, float]] = {}
        self._tried: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def start(self, name: str, mark: str | None = None) -> str:
        """A new session's token; `mark` is what [`Accounts.mark`] said when the password was checked."""
        token, now = secrets.token_urlsafe(32), time.monotonic()
        with self._lock:
            self._open = {key: entry for key, entry in self._open.items() if entry[2] > now}
            self._open[_digest(token)] = (name, mark, now + self.seconds)
            self._tried.pop(name, None)
        return token

    def name_of(self, token: str | None, accounts: Accounts | None = None) -> str | None:
        """Whose session a token is; `None` for none, and where the account has another password or is gone."""
        entry = self._open.get(_digest(token)) if token else None
        if entry is None or entry[2] <= time.monotonic():
            return None
        return entry[0] if accounts is None or accounts.mark(entry[0]) == entry[1] else None

    def end(self, token: str | None) -> None:
        """Log out."""
        if token:
            with self._lock:
                self._open.pop(_digest(token), None)

    def may_try(self, name: str) -> bool:
        """Count a try of a password, before it is checked; whether there were fewer than ten of late.

        Counted afterwards, as many would be checked at once as there are threads. A login forgets the tries.
        """
        with self._lock:
            now = time.monotonic()
            if len(self._tried) > 10_000:  # names that somebody made up; who is locked stays locked
                self._tried = {key: moments for key, moments in self._tried.items() if moments[-1] > now - _WINDOW}
            recent = [moment for moment in self._tried.get(name, []) if moment > now - _WINDOW]
            if len(recent) >= _TRIES:
                return False
            self._tried[name] = [*recent, now]
            return True


def _hash(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
