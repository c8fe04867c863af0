"""
Roles that one process of a database has at a time, each with an epoch that goes up with every change of holder.

Both stores keep theirs in one table and by these rules; where their time comes from is their own business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, bindparam, select, update

from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.sql_parts import batches, insert_or_leave
from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.lease import Owner, is_held_under, role_is_held
from runcomfy.domain.machine import OwnerId

_roles, _owners = tables.roles, tables.owners
_ROLE: Final = select(_roles).where(_roles.c.name == bindparam("role"))
_HELD_ROLE: Final = _ROLE.with_for_update()
_SAVE_ROLE: Final = update(_roles).where(_roles.c.name == bindparam("role"))
_DROP_ROLE: Final = (
    update(_roles)
    .where((_roles.c.name == bindparam("role")) & (_roles.c.owner_id == bindparam("owner")))
    .values(owner_id=None)
)
_NOT_SIGNED_OFF: Final = select(_owners).where(_owners.c.ended_at.is_(None))
_NOT_SIGNED_OFF_BUT: Final = _NOT_SIGNED_OFF.where(_owners.c.id.not_in(bindparam("but", expanding=True)))
_ENDED: Final = select(_owners.c.ended_at).where(_owners.c.id == bindparam("owner"))


def read_owners(
    connection: Connection, ids: Collection[OwnerId] | None, but: Collection[OwnerId]
) -> Mapping[OwnerId, Owner]:
    """Return the owners with these ids, or all that have not signed off, `but` those."""
    if ids is not None:
        named = [select(_owners).where(_owners.c.id.in_(some)) for some in batches(sorted(set(ids)))]
        found = [row for query in named for row in connection.execute(query)]
    elif but:
        found = list(connection.execute(_NOT_SIGNED_OFF_BUT, {"but": batches(sorted(set(but)))[0]}))
    else:
        found = list(connection.execute(_NOT_SIGNED_OFF))
    return {row.id: Owner(*row) for row in found if row.id not in but}  # more than a statement takes


def take_role(
    connection: Connection, clock: Callable[[], datetime], role: str, owner_id: OwnerId, *, lease: timedelta
) -> int | None:
    """Take or keep a role; return its epoch, or None if somebody else has it.

    The `clock` is read when the role's row is held. A time of before would be too old where the caller was stopped in
    between, and would look like a clock that was set back: another holder's lease would be cut short.
    """
    if (row := connection.execute(_HELD_ROLE, {"role": role}).one_or_none()) is None:
        nobody = {"name": role, "owner_id": None, "epoch": 0, "since": clock(), "expires_at": clock()}
        connection.execute(insert_or_leave(connection, _roles), nobody)
        row = connection.execute(_HELD_ROLE, {"role": role}).one()
    now = clock()
    if row.owner_id == owner_id:
        connection.execute(_SAVE_ROLE, {"role": role, "expires_at": now + lease})
        return int(row.epoch)
    if row.owner_id is not None and role_is_held(
        expires_at=row.expires_at, now=now, signed_off=_signed_off(connection, row.owner_id)
    ):
        if row.expires_at > now + lease:  # the clock was set back since
            connection.execute(_SAVE_ROLE, {"role": role, "expires_at": now + lease})
        return None
    epoch = int(row.epoch) + 1
    held = {"owner_id": owner_id, "epoch": epoch, "since": now, "expires_at": now + lease}
    connection.execute(_SAVE_ROLE, {"role": role, **held})
    return epoch


def drop_role(connection: Connection, role: str, owner_id: OwnerId) -> None:
    """Give a role up, if this owner holds it. The epoch stays, so that the next holder's is another."""
    connection.execute(_DROP_ROLE, {"role": role, "owner": owner_id})


def role_holder(connection: Connection, now: datetime, role: str) -> OwnerId | None:
    """Return who holds a role now, if anybody does."""
    row = connection.execute(_ROLE, {"role": role}).one_or_none()
    if row is None or row.owner_id is None or row.expires_at <= now or _signed_off(connection, row.owner_id):
        return None
    return OwnerId(row.owner_id)


def must_hold(connection: Connection, role: str, epoch: int) -> None:
    """Raise LeaseLost unless the role's epoch is still this one; it stays so until this transaction ends."""
    row = connection.execute(_HELD_ROLE, {"role": role}).one_or_none()
    if row is None or row.owner_id is None or not is_held_under(row.epoch, epoch):
        holder = "nobody" if row is None or row.owner_id is None else row.owner_id
        raise LeaseLost(
            f"the role {role} is held by {holder} now",
            hint="nothing to do: another process plans for this database",
            details={"epoch": None if row is None else row.epoch, "expected_epoch": epoch},
        )


def _signed_off(connection: Connection, owner_id: str) -> bool:
    return connection.execute(_ENDED, {"owner": owner_id}).scalar() is not None
