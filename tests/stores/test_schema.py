"""The schema in code and the one that the migrations make are one."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from prefmw.stores.schema import HEAD, VERSION_TABLE, metadata


def differences(store) -> list:
    with store._database.reading() as connection:
        options = {"compare_type": True, "version_table": VERSION_TABLE}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def test_migrations_make_the_schema_that_the_code_uses(store):
    assert differences(store) == []


def test_head_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", "prefmw.stores:migrations")
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]
