"""Alembic's entry: runs the migrations on the connection that prefmw.stores.database hands over."""

from alembic import context

from prefmw.stores.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
)
context.run_migrations()
