"""`rlhf-ext label`: the page over a store, served."""

import errno
import getpass
import ipaddress
import socket
import sys
from pathlib import Path

from ..store import open_store
from .accounts import Accounts


def serve(
    location: str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    pool: str | None = None,
    guidelines: str | None = None,
    users: str | None = None,
    hostname: str | None = None,
    https: bool = False,
) -> None:
    """
    Serve the labelling page until interrupted.

    Args:
        location (`str`): file or URL of the label store; it must be there.
        host (`str`), port (`int`): address; 0 takes a free port.
        pool (`str`, *optional*): label this pool only.
        guidelines (`str`, *optional*): text file shown to annotators.
        users (`str`, *optional*): file of accounts; needed on any address but this machine's own.
        hostname (`str`, *optional*): name by which a proxy in front calls the page.
        https (`bool`, *optional*, defaults to `False`): a proxy in front speaks HTTPS, so the session cookie may ask
            for it.

    Raises:
        ValueError: another address than this machine's without accounts, a file or a pool that is not there, a store
            that cannot be opened, an address that cannot be listened on.
    """
    try:
        import uvicorn

        from .app import build_app
    except ImportError as error:
        raise ValueError(f'{error}. The labelling page is an extra: pip install "rlhf_ext[label]".') from error

    if not is_loopback(host) and users is None:
        raise ValueError(
            f"`--host` is {host!r}, which others can reach, so annotators have to log in. Add accounts by `rlhf-ext "
            "label-user --users FILE --name NAME` and pass `--users FILE`, or keep 127.0.0.1."
        )
    accounts = None if users is None else Accounts(users)
    if accounts is not None and not accounts.names():
        raise ValueError(f"`--users` {users!r} holds no account. Add one by `rlhf-ext label-user`.")
    text = "" if guidelines is None else Path(guidelines).read_text(encoding="utf-8")
    names = [name for name in (hostname, None if host in ("0.0.0.0", "::") else host) if name]
    if host in ("0.0.0.0", "::") and hostname is None:
        names += [socket.gethostname(), socket.getfqdn(), *_own_addresses()]
    with open_store(location, create=False) as store:
        _check_pool(pool, store.pools())
        app = build_app(store, pool=pool, guidelines=text, accounts=accounts, hosts=names, secure_cookie=https)
        server = uvicorn.Server(
            uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)
        )
        listener = _listen(host, port)  # before the address is said: who calls at once waits and is not refused
        shown = f"[{host}]" if ":" in host else host
        print(f"Labelling page at http://{shown}:{listener.getsockname()[1]} (Ctrl+C ends it)", flush=True)
        server.run(sockets=[listener])


def set_user(users: str, name: str) -> None:
    """Ask for a password (a line on standard input where there is no terminal) and store its hash.

    Raises:
        ValueError: as [`Accounts.set_password`].
    """
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    Accounts(users).set_password(name, password)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_pool(pool: str | None, pools: list[str]) -> None:
    if pool is not None and pool not in pools:
        there = f"has {', '.join(map(repr, pools))}" if pools else "has no comparisons yet"
        raise ValueError(f"`--pool` is {pool!r}, but the store {there}. Name one of these, or leave it out.")


def _listen(host: str, port: int) -> socket.socket:
    is_v6 = ":" in host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    both = is_v6 and socket.has_dualstack_ipv6()  # "::" is every address of the machine
    try:
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            why = f"`--port` is {port}, which another program uses on {host}."
        else:
            why = f"`--host` {host!r} with `--port` {port} cannot be listened on: {error}."
        raise ValueError(f"{why} Give another one; `--port 0` takes a port that is free.") from error


def _own_addresses() -> list[str]:
    try:
        return socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        return []
