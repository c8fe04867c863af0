"""Run by Alembic, with the connection of `runcomfy.adapters.stores.migrate`, which is inside a transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
