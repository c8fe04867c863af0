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

    __slots__ = ("key", "name", "number", "place", "process", "required", "value")

    def __init__(
        self, bind: Any, name: str, number: int | None, process: Callable[[Any], Any] | None, place: int | None = None
    ) -> None:
        self.key, self.name = bind.key, name
        self.required: bool = bind.required
        self.number = number
        """Of the literal in the statement; None: the one it was compiled with."""
        self.value = bind.value
        self.process = process
        self.place = place
        """In the list that is given; None: it is no list."""

    def of(self, given: Mapping[str, Any], literals: Sequence[Any]) -> Any:
        """Return what is given. Raises KeyError if it is missing."""
        value = given.get(self.key, _MISSING)
        if value is _MISSING:
            value = given.get(self.name, _MISSING)
            if value is _MISSING:
                if self.required:
                    raise KeyError(self.key)
                value = self.value if self.number is None else literals[self.number].value
        return value


class _Plan:
    """What is known of a statement since its first execution, with lists of these lengths."""

    __slots__ = ("make", "parameters", "sql")

    def __init__(self, sql: str, parameters: list[_Parameter], make: Callable[[Any], Any] | None) -> None:
        self.sql, self.parameters, self.make = sql, parameters, make

    def values(self, given: Mapping[str, Any], literals: Sequence[Any]) -> list[Any]:
        """Return what is sent. Raises KeyError for one that is missing, and what writing a value raises."""
        found = []
        for each in self.parameters:
            value = given.get(each.key, _MISSING)
            if value is _MISSING:
                value = each.of(given, literals)
            if each.place is not None:
                value = value[each.place]
            found.append(value if each.process is None else each.process(value))
        return found

    def rows(self, cursor: sqlite3.Cursor) -> list[Any]:
        """Return everything that was found."""
        return [] if self.make is None else list(map(self.make, cursor.fetchall()))


class _Known:
    """A statement that was executed before; `lists` are its parameters that stand for several values."""

    __slots__ = ("lists", "plans")

    def __init__(self, lists: list[_Parameter]) -> None:
        self.lists = lists
        self.plans: dict[tuple[int, ...], _Plan] = {}

    def lengths(self, given: Mapping[str, Any], literals: Sequence[Any]) -> tuple[int, ...]:
        """Return how many values each list has. Raises KeyError for one that is missing, TypeError."""
        return tuple(len(each.of(given, literals)) for each in self.lists) if self.lists else ()


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
        if parameters is None:
            parameters = _NOTHING
        elif type(parameters) is not dict:
            return self._whole.execute(statement, parameters)
        which = (id(statement), *parameters)
        kept = _KEPT.get(which)
        key: Any = None
        if kept is None:
            lasts = "_generate_cache_key" in statement.__dict__  # it was executed before: it is no passing one
            found = statement._generate_cache_key()  # type: ignore[attr-defined]
            if found is None or found[2]:
                return self._whole.execute(statement, parameters)
            key, literals = (found[0], *parameters), found[1]
            known = _KNOWN.get(key, _MISSING)
            if lasts and known is not _MISSING:
                _KEPT[which] = known, literals, statement
        else:
            known, literals, _ = kept
        if known is None:
            return self._whole.execute(statement, parameters)
        try:
            plan = None if known is _MISSING else known.plans.get(known.lengths(parameters, literals))
            values = None if plan is None else plan.values(parameters, literals)
        except Exception:  # noqa: BLE001 - SQLAlchemy finds the same, and says it in its words
            return self._whole.execute(statement, parameters)
        if plan is None or values is None:
            result = self._whole.execute(statement, parameters)
            if known is _MISSING:
                known = _KNOWN[key] = _known(result)
            if known is not None:
                known.plans[known.lengths(parameters, literals)] = _plan_of(result)
            return result
        try:
            cursor = self._driver.execute(plan.sql, values)
            return _Answer(plan.rows(cursor), cursor.rowcount)
        except sqlite3.Error as error:
            raise _wrapped(plan.sql, error, self.dialect) from error


_NOTHING: Final[dict[str, Any]] = {}
_KNOWN: Final[dict[Any, Any]] = {}
"""By what a statement says; None: one that is not plain."""
_KEPT: Final[dict[tuple[Any, ...], tuple[Any, Sequence[Any], Executable]]] = {}
"""By the statement itself, of those that are made once; they are held here, so that no other gets their number."""


def _known(result: CursorResult[Any]) -> _Known | None:
    """Return what an execution has shown of its statement; None if it is not plain."""
    context: Any = result.context
    compiled = context.compiled
    if (
        compiled.isplaintext
        or compiled.literal_execute_params
        or compiled.insert_prefetch
        or compiled.update_prefetch
        or compiled.escaped_bind_names
        or compiled.schema_translate_map
        or not compiled.positional
        or compiled.cache_key is None
        or len(context.parameters) != 1
        or any(bind.callable for bind in compiled.bind_names)
        or any(isinstance(process, tuple) for process in compiled._bind_processors.values())
        or (result.returns_rows and result._metadata._tuplefilter is not None)
    ):
        return None
    names = {compiled.bind_names[bind] for bind in compiled.post_compile_params}
    return _Known([each for each in _parameters(compiled, {}) if each.name in names])


def _parameters(compiled: Any, lists: Mapping[str, Sequence[str]]) -> list[_Parameter]:
    """Return where each value of a statement comes from; `lists`: what the parameters that are lists became."""
    numbers = {}
    clones = compiled._cache_key_bind_match[0]
    for number, original in enumerate(compiled.cache_key[1]):
        for bind in clones[original]:
            numbers[bind] = number
    binds = {name: bind for bind, name in compiled.bind_names.items()}
    return [
        _Parameter(binds[name], name, numbers.get(binds[name]), compiled._bind_processors.get(name), place)
        for name in compiled.positiontup
        for place in (range(len(lists[name])) if name in lists else (None,))
    ]


def _plan_of(result: CursorResult[Any]) -> _Plan:
    """Return how to execute the statement the next time."""
    context: Any = result.context
    make = _maker(result._metadata) if result.returns_rows else None
    return _Plan(context.statement, _parameters(context.compiled, context._expanded_parameters), make)


def _maker(metadata: Any) -> Callable[[Any], Any]:
    """Return what makes a row of what the driver read."""
    processors, names = metadata._effective_processors, metadata._key_to_index

    def make(data: Any) -> Any:
        return Row(metadata, processors, names, data)

    return make


def _wrapped(statement: str, error: sqlite3.Error, dialect: Dialect) -> BaseException:
    return DBAPIError.instance(statement, None, error, sqlite3.Error, hide_parameters=True, dialect=dialect)
