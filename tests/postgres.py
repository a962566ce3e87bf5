"""A PostgreSQL server for tests: unprivileged user, 127.0.0.1, free port, password and data made on the spot.

`python tests/postgres.py FOLDER` starts one and prints its URL, `python tests/postgres.py --stop FOLDER` stops it;
`.ci/run` uses both. Tests look for `RLHF_EXT_TEST_POSTGRES` first, and start one themselves where the programs are.
"""

import argparse
import glob
import os
import pwd
import secrets
import shutil
import socket
import subprocess
from pathlib import Path


VARIABLE = "RLHF_EXT_TEST_POSTGRES"


def find_programs() -> Path | None:
    """Folder of `initdb` and `pg_ctl`, the newest version's; Debian keeps them off the PATH."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda name: -float(Path(name).parent.name))
    on_path = shutil.which("initdb")
    folders += [str(Path(on_path).parent)] if on_path else []
    return next((Path(folder) for folder in folders if (Path(folder) / "initdb").exists()), None)


def start(folder: Path) -> str:
    """Start a server whose data lie in `folder`; its URL."""
    programs = find_programs()
    if programs is None:
        raise RuntimeError("no PostgreSQL programs: apt-get install postgresql")
    folder.mkdir(parents=True, exist_ok=True)
    password = secrets.token_hex(16)
    user = _user()
    if user:
        shutil.chown(folder, user)
    folder.chmod(0o700)
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if user:
        shutil.chown(secret, user)
    data = folder / "data"
    initdb = [programs / "initdb", "-D", data, "-U", "tests", "-A", "scram-sha-256", f"--pwfile={secret}"]
    _run([*initdb, "--no-sync", "-E", "UTF8", "--locale=C"], folder, user)
    secret.unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A killed server loses nothing of what the system has; only a loss of power asks for fsync.
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories='' -c fsync=off"
    log = folder / "log"
    _run([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-t", "60", "-o", options, "start"], folder, user)
    return f"postgresql://tests:{password}@127.0.0.1:{port}/postgres"


def stop(folder: Path, mode: str = "fast") -> None:
    """Stop the server of `folder`; `mode` is pg_ctl's."""
    _run([find_programs() / "pg_ctl", "-D", folder / "data", "-m", mode, "-w", "stop"], folder, _user())


def restart(folder: Path) -> None:
    """Kill the server of `folder` without a shutdown, and start it again on its port."""
    programs = find_programs()
    _run(
        [programs / "pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "-l", folder / "log", "restart"],
        folder,
        _user(),
    )


def _user() -> str | None:
    """PostgreSQL refuses to run as root; somebody without rights is found for it."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _run(command: list, folder: Path, user: str | None) -> None:
    identity = {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    # The server keeps what it inherits: with a pipe for output, its end would never come.
    with (folder / "commands").open("a") as output:
        result = subprocess.run(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/", **identity
        )
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{(folder / 'commands').read_text()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop", action="store_true")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.stop:
        stop(arguments.folder)
    else:
        print(start(arguments.folder))
