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


def test_upgrading_twice_changes_nothing(url):
    database = Database(url)
    assert database.upgrade() == (None, "0001")
    assert database.upgrade() == ("0001", "0001")
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
