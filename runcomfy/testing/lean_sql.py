"""
A connection to SQLite that runs the product's statements as SQLAlchemy does, at a quarter of the work.

What SQLAlchemy finds out anew at each execution - where a parameter comes from, how it is written, what a row's columns
are called and how they are read - is found out once for each statement, by having SQLAlchemy run it. The SQL, the
values and the rows are the same; a text's rows are plain tuples. Whatever is not plain (lists of parameters, `IN`,
mistakes) is left to SQLAlchemy.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Executable
from sqlalchemy.engine import CursorResult, Row
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound

from runcomfy.adapters.stores.sqlite import raw

_MISSING: Final = object()


class _Answer:
    """What a statement returned, all of it read."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: list[Any], rowcount: int) -> None:
        self._rows, self.rowcount = rows, rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def all(self) -> Sequence[Any]:
        """Return every row."""
        return self._rows

    def fetchall(self) -> Sequence[Any]:
        """Return every row."""
        return self._rows

    def first(self) -> Any:
        """Return the first row, None if there is none."""
        return self._rows[0] if self._rows else None

    def one_or_none(self) -> Any:
        """Return the only row, None if there is none. Raises MultipleResultsFound."""
        if len(self._rows) > 1:
            raise MultipleResultsFound("several rows were found where one was asked for")
        return self.first()

    def one(self) -> Any:
        """Return the only row. Raises NoResultFound, MultipleResultsFound."""
        if not self._rows:
            raise NoResultFound("no row was found where one was asked for")
        return self.one_or_none()

    def scalar(self) -> Any:
        """Return the first value of the first row, None if there is none."""
        return self._rows[0][0] if self._rows else None

    def scalar_one(self) -> Any:
        """Return the first value of the only row. Raises NoResultFound, MultipleResultsFound."""
        return self.one()[0]


class _Parameter:
    """Where one value of a statement comes from, and how it is written."""

    __slots__ = ("key", "name", "number", "process", "required", "value")

    def __init__(self, bind: Any, name: str, number: int | None, process: Callable[[Any], Any] | None) -> None:
        self.key, self.name = bind.key, name
        self.required: bool = bind.required
        self.number = number
        """Of the literal in the statement; None: the one it was compiled with."""
        self.value = bind.value
        self.process = process


class _Plan:
    """What is known of a statement since its first execution."""

    __slots__ = ("_make", "parameters", "sql")

    def __init__(self, sql: str, parameters: list[_Parameter], make: Callable[[Any], Any] | None) -> None:
        self.sql, self.parameters, self._make = sql, parameters, make

    def values(self, given: Mapping[str, Any], literals: Sequence[Any]) -> list[Any]:
        """Return what is sent. Raises KeyError for one that is missing, and what writing a value raises."""
        found = []
        for each in self.parameters:
            value = given.get(each.key, _MISSING)
            if value is _MISSING:
                value = given.get(each.name, _MISSING)
                if value is _MISSING:
                    if each.required:
                        raise KeyError(each.key)
                    value = each.value if each.number is None else literals[each.number].value
            found.append(value if each.process is None else each.process(value))
        return found

    def rows(self, cursor: sqlite3.Cursor) -> list[Any]:
        """Return everything that was found."""
        return [] if self._make is None else list(map(self._make, cursor.fetchall()))


class LeanConnection:
    """The part of SQLAlchemy's `Connection` that the stores use, over one of its connections to SQLite."""

    def __init__(self, connection: Connection) -> None:
        """`connection` is used for everything that is not plain."""
        self.dialect: Dialect = connection.dialect
        self._whole = connection
        self._driver = raw(connection)

    def exec_driver_sql(self, statement: str, parameters: Any = None) -> Any:
        """Run a text in the driver's words; with a list of parameters, once for each."""
        try:
            if parameters is None:
                cursor = self._driver.execute(statement)
            elif isinstance(parameters, (Mapping, tuple)):
                cursor = self._driver.execute(statement, parameters)
            elif not parameters:
                return self._whole.exec_driver_sql(statement, parameters)
            else:
                cursor = self._driver.executemany(statement, parameters)
            if cursor.description is None:
                return _Answer([], cursor.rowcount)
            return _Answer(cursor.fetchall(), cursor.rowcount)
        except sqlite3.Error as error:
            raise _wrapped(statement, error, self.dialect) from error

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        """Run a statement."""
        if parameters is not None and type(parameters) is not dict:
            return self._whole.execute(statement, parameters)
        found = statement._generate_cache_key()  # type: ignore[attr-defined]
        if found is None or found[2]:
            return self._whole.execute(statement, parameters)
        key = found[0], tuple(sorted(parameters)) if parameters else ()
        plan = _PLANS.get(key, _MISSING)
        if plan is _MISSING:
            result = self._whole.execute(statement, parameters)
            _PLANS[key] = _plan_of(result, found)
            return result
        if plan is None:
            return self._whole.execute(statement, parameters)
        try:
            values = plan.values(parameters or _NOTHING, found[1])
        except Exception:  # noqa: BLE001 - SQLAlchemy finds the same, and says it in its words
            return self._whole.execute(statement, parameters)
        try:
            cursor = self._driver.execute(plan.sql, values)
            return _Answer(plan.rows(cursor), cursor.rowcount)
        except sqlite3.Error as error:
            raise _wrapped(plan.sql, error, self.dialect) from error


_NOTHING: Final[Mapping[str, Any]] = {}
_PLANS: Final[dict[Any, Any]] = {}
"""By statement; None: one that is not plain."""


def _plan_of(result: CursorResult[Any], key: Any) -> _Plan | None:
    """Return what an execution has shown of its statement; None if the next one may differ from it."""
    context: Any = result.context
    compiled = context.compiled
    if (
        compiled.isplaintext
        or compiled.literal_execute_params
        or compiled.post_compile_params
        or compiled.insert_prefetch
        or compiled.update_prefetch
        or compiled.escaped_bind_names
        or compiled.schema_translate_map
        or not compiled.positional
        or compiled.cache_key is None
        or len(context.parameters) != 1
        or any(bind.callable for bind in compiled.bind_names)
        or any(isinstance(process, tuple) for process in compiled._bind_processors.values())
    ):
        return None
    numbers = {}
    clones = compiled._cache_key_bind_match[0]
    for number, original in enumerate(compiled.cache_key[1]):
        for bind in clones[original]:
            numbers[bind] = number
    binds = {name: bind for bind, name in compiled.bind_names.items()}
    parameters = [
        _Parameter(binds[name], name, numbers.get(binds[name]), compiled._bind_processors.get(name))
        for name in compiled.positiontup
    ]
    if not result.returns_rows:
        return _Plan(context.statement, parameters, None)
    metadata: Any = result._metadata
    if metadata._tuplefilter is not None:
        return None
    return _Plan(context.statement, parameters, _maker(metadata))


def _maker(metadata: Any) -> Callable[[Any], Any]:
    """Return what makes a row of what the driver read."""
    processors, names = metadata._effective_processors, metadata._key_to_index

    def make(data: Any) -> Any:
        return Row(metadata, processors, names, data)

    return make


def _wrapped(statement: str, error: sqlite3.Error, dialect: Dialect) -> BaseException:
    return DBAPIError.instance(statement, None, error, sqlite3.Error, hide_parameters=True, dialect=dialect)
