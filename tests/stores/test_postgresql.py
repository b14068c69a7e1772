"""The SQL store on PostgreSQL: the same conformance, in a database made for this run and dropped after it."""

from __future__ import annotations

import uuid

import pytest

from prefmw.errors import MissingExtraError, SchemaVersionError, StoreError
from prefmw.stores import SQLPreferenceStore
from prefmw.stores.database import Database
from tests.stores.conformance import StoreConformance

psycopg = pytest.importorskip("psycopg", reason="needs the extra 'postgres'")
SERVER = "127.0.0.1:5432"


def admin():
    try:
        return psycopg.connect(f"postgresql://postgres@{SERVER}/postgres", autocommit=True, connect_timeout=3)
    except psycopg.OperationalError as error:
        pytest.skip(f"no PostgreSQL with trust authentication on {SERVER}: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def name():
    name = f"prefmw_test_{uuid.uuid4().hex[:12]}"
    with admin() as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield name
    with admin() as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(name):
    """The database, empty."""
    with psycopg.connect(f"postgresql://postgres@{SERVER}/{name}", autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return f"postgresql+psycopg://postgres@{SERVER}/{name}"


@pytest.fixture
def store(url):
    database = Database(url)
    database.upgrade()
    database.close()
    store = SQLPreferenceStore(url)
    yield store
    store.close()


class TestPostgreSQL(StoreConformance):
    """Everything a store must do."""


def test_an_empty_database_asks_for_the_upgrade(url):
    with pytest.raises(SchemaVersionError, match="prefmw db upgrade"):
        SQLPreferenceStore(url)


def test_another_program_s_database_is_left_alone(url):
    database = Database(url)
    with database.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE theirs (id INTEGER)")
    with pytest.raises(SchemaVersionError, match="another program's"):
        database.upgrade()
    database.close()


def test_upgrades_at_once_wait_for_each_other(url):
    import threading

    barrier, failures = threading.Barrier(4), []

    def upgrade() -> None:
        database = Database(url)
        barrier.wait(30)
        try:
            database.upgrade()
        except BaseException as error:
            failures.append(error)
        database.close()

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    SQLPreferenceStore(url).close()


def test_the_migrations_make_the_schema_that_the_code_uses(store):
    from tests.stores.test_schema import differences

    assert differences(store) == []


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SET statement_timeout = 20; SELECT pg_sleep(5)", "took too long"),
        ("SET default_transaction_read_only = on; COMMIT; BEGIN; DELETE FROM users", "read-only"),
        ("SELECT 1 / 0", "division by zero"),
    ],
)
def test_what_the_server_says_is_told_for_what_it_is(store, statement, message):
    with pytest.raises(StoreError, match=message) as caught, store._database.writing() as connection:
        for part in statement.split("; "):
            connection.exec_driver_sql(part)
    assert "does not answer" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_database_that_does_not_exist_is_told(name):
    with pytest.raises(StoreError, match="does not exist"):
        SQLPreferenceStore(f"postgresql+psycopg://postgres@{SERVER}/no_such_database_here")


def test_upgrading_twice_changes_nothing(url):
    database = Database(url)
    assert database.upgrade() == (None, "0002")
    assert database.upgrade() == ("0002", "0002")
    database.close()


def test_a_server_that_does_not_answer_is_told_without_the_password():
    with pytest.raises(StoreError, match="does not answer") as caught:
        SQLPreferenceStore("postgresql+psycopg://bob:s3cret@127.0.0.1:1/nowhere?connect_timeout=2")
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_prints_its_pip_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'prefmw\[postgres\]'"):
        SQLPreferenceStore("postgresql+psycopg://x@127.0.0.1/x")
