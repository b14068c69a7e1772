"""The SQL store on SQLite: conformance, durability settings, and every way a file can be wrong."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event

from prefmw.errors import SchemaVersionError, StoreError, StoreLockedError, UsageError
from prefmw.preferences import Feedback, Source, Stated
from prefmw.stores import SQLPreferenceStore, database
from tests.stores.conformance import StoreConformance, turn


class TestSQLite(StoreConformance):
    """Everything a store must do."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prefmw.db"


def reopened(file: Path) -> SQLPreferenceStore:
    return SQLPreferenceStore(f"sqlite:///{file}")


def test_connections_are_durable_and_overwrite_what_is_deleted(store):
    with store._database.reading() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


def test_rows_are_what_the_schema_says(store, file):
    store.add_user("alice", persona="p", actor="test")
    store.write_weights("alice", {"humor": Stated(0.5, 0.7)}, source=Source.inferred, actor="test")
    store.record(turn())
    with sqlite3.connect(file) as raw:
        assert raw.execute("SELECT id, persona, revision FROM users").fetchall() == [("alice", "p", 2)]
        assert raw.execute("SELECT user_id, dimension, source, value, confidence FROM weights").fetchall() == [
            ("alice", "humor", "inferred", 0.5, 0.7)
        ]
        assert raw.execute("SELECT method, revision, seed, input_tokens, output_tokens FROM turns").fetchall() == [
            ("linear", 1, 2**63 - 1, 12, 3)
        ]


def test_deleting_a_user_s_row_takes_all_that_hangs_on_it(store):
    store.add_user("alice", actor="test")
    store.write_weights("alice", {"humor": Stated(0.5)}, source=Source.user, actor="test")
    store.record(turn())
    with store._database.writing() as connection:
        connection.exec_driver_sql("DELETE FROM users")
        for table in ("weights", "revisions", "conversations", "turns", "feedback", "vectors"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0


def test_what_was_erased_is_in_no_file_byte_by_byte(store, file):
    """Canaries in every column that takes a text, before and after others' rows move the pages about."""
    canary = "canary-7f3a"
    for index in range(40):
        store.add_user(f"user{index}", persona="x" * 500, actor="test")
    alice = f"alice-{canary}"
    store.add_user(alice, persona=canary * 300, actor=canary, reason=canary)
    store.write_weights(
        alice, {f"d-{canary}": Stated(1.0, 1.0, {"quote": canary})}, source=Source.learned, actor="test"
    )
    recorded = store.record(
        turn(alice, system=canary, prompt=canary * 500, text=canary * 2000, plan={"p": canary}, model=canary)
    )
    store.add_feedback(Feedback(alice, "edit", canary, canary, canary, {canary: (1.0, 0.0)}, recorded.turn_id))
    store.put_vector(alice, "persona", canary, canary, [1.0])
    store.rename_user(alice, f"{canary}-alice", actor="test")
    for index in range(40):
        store.edit_user(f"user{index}", persona="y" * (index * 90), actor="test")
    assert any(canary.encode() in path.read_bytes() for path in file.parent.iterdir() if path.is_file())
    store.erase(f"{canary}-alice")
    held = [path.name for path in file.parent.iterdir() if path.is_file() and canary.encode() in path.read_bytes()]
    assert held == []


def test_erasing_beside_a_reader_says_what_remains(store, file, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    store.close()
    store.add_user("alice", actor="test")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM users").fetchall()
    with pytest.raises(StoreLockedError, match="is erased, but the write-ahead log"):
        store.erase("alice")
    other.execute("ROLLBACK")
    other.close()
    assert list(store.users()) == []


def test_rows_of_the_first_schema_are_upgraded(tmp_path):
    file = tmp_path / "old.db"
    old = database.Database(f"sqlite:///{file}")
    old._make_file()
    with old.writing() as connection:
        database._run_migrations(connection, "0001")
        connection.exec_driver_sql(
            "INSERT INTO users VALUES ('alice', 'p', NULL, '{}', 2, '2026-01-01 00:00:00', '2026-01-01 00:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO weights VALUES ('alice', 'humor', 'user', 0.5, 1, '2026-01-01 00:00:00')"
        )
        for number, extra in ((1, ""), (2, ', "weight.humor.user": [0.5, 1.0]')):
            times = '{"weight.humor.user": "2026-01-01T00:00:00+00:00"}' if extra else "{}"
            snapshot = f'{{"persona": "p", "method": null, "updated_at": {times}{extra}}}'
            connection.exec_driver_sql(
                "INSERT INTO revisions VALUES ('alice', ?, 'a', '', '{}', ?, '2026-01-01 00:00:00')", (number, snapshot)
            )
    assert old.upgrade() == ("0001", "0002")
    old.close()
    store = reopened(file)
    profile = store.profile("alice")
    assert (profile.weights["humor"].value, profile.weights["humor"].evidence, profile.inferred_from) == (
        0.5,
        None,
        None,
    )
    assert store.revert("alice", 1, actor="test").weights == {}
    assert store.revert("alice", 2, actor="test").weights["humor"].value == 0.5
    store.close()


def test_a_fresh_file_gets_its_schema_and_its_folder(tmp_path):
    file = tmp_path / "deep" / "er" / "p.db"
    reopened(file).close()
    assert file.exists()


def test_what_is_acknowledged_survives_kill(file):
    """Killed from outside in the middle of 1,000 writes, at whatever point one of them has reached."""
    script = f"""
from prefmw.stores import SQLPreferenceStore
from prefmw.preferences import Source, Stated
store = SQLPreferenceStore("sqlite:///{file}")
store.add_user("alice", actor="test")
for step in range(1, 1001):
    store.write_weights("alice", {{"humor": Stated(step / 1000)}}, source=Source.user, actor="test")
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        for line in writer.stdout:
            if int(line) == 500:
                break
        writer.kill()
        acknowledged = max([500, *map(int, writer.stdout.read().split())])
    assert 500 <= acknowledged < 1000
    store = reopened(file)
    assert store.profile("alice").weights["humor"].value in (acknowledged / 1000, (acknowledged + 1) / 1000)
    assert len(store.revisions("alice")) - 1 in (acknowledged, acknowledged + 1)
    store.close()


def test_processes_that_open_a_fresh_file_at_once_all_succeed(tmp_path):
    """They wait for each other at a barrier, so that they really meet, over ten files."""
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(4), context.Queue()

    def open_all() -> None:
        for index in range(10):
            barrier.wait(30)
            try:
                reopened(tmp_path / f"{index}.db").close()
            except BaseException as error:
                failures.put(repr(error))

    running = [context.Process(target=open_all) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 4
    assert failures.empty(), failures.get()


def test_nobody_else_may_read_the_file(tmp_path):
    file = tmp_path / "new" / "p.db"
    store = reopened(file)
    store.add_user("alice", actor="test")
    files = list(file.parent.iterdir())
    assert len(files) == 3  # with the write-ahead log and its index
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
    assert oct(file.parent.stat().st_mode & 0o777) == "0o700"
    store.close()


def test_a_locked_database_is_told_and_nothing_is_written(store, file, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    store.close()  # the next connection takes the shorter timeout
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreLockedError, match="locked by another process"):
        store.add_user("alice", actor="test")
    other.execute("ROLLBACK")
    assert list(store.users()) == []
    other.close()


def test_a_reader_does_not_wait_for_a_writer(store, file):
    store.add_user("alice", actor="test")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.profile("alice").revision == 1
    other.close()


def test_a_read_only_database_is_told(store, file):
    store.add_user("alice", actor="test")
    store.close()
    read_only = SQLPreferenceStore(f"sqlite:///file:{file}?mode=ro&uri=true")
    assert read_only.profile("alice").revision == 1
    with pytest.raises(StoreError, match="read-only"):
        read_only.edit_user("alice", persona="x", actor="test")
    read_only.close()


def test_a_full_disk_is_told_and_the_change_is_undone(store):
    store.add_user("alice", persona="before", actor="test")

    def limit(connection, *_):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    store.close()
    event.listen(store._database._engine, "connect", limit)
    with pytest.raises(StoreError, match="disk is full"):
        for _ in range(1000):
            store.record(turn(text="x" * 4000))
    before = store.profile("alice")
    with pytest.raises(StoreError, match="disk is full"):
        for step in range(1000):
            before = store.profile("alice")
            store.edit_user("alice", persona=f"{step}" + "x" * 3000, actor="test")
    assert store.profile("alice") == before


@pytest.mark.parametrize("content", [b"not a database, whatever its name says" * 50, b"\x00" * 4096])
def test_a_file_that_is_no_database_is_told_and_left_alone(file, content):
    file.write_bytes(content)
    with pytest.raises(StoreError, match="not an SQLite database"):
        reopened(file)
    assert file.read_bytes() == content


def test_another_program_s_database_is_left_alone(file):
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE theirs (id INTEGER)")
    for call in (lambda: reopened(file), lambda: database.Database(f"sqlite:///{file}").upgrade()):
        with pytest.raises(SchemaVersionError, match="another program's"):
            call()
    with sqlite3.connect(file) as other:
        assert [row[0] for row in other.execute("SELECT name FROM sqlite_master")] == ["theirs"]


def test_a_database_of_a_newer_schema_is_refused(store, file):
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE prefmw_version SET version_num = '9999'")
    for call in (lambda: reopened(file), store._database.upgrade):
        with pytest.raises(SchemaVersionError, match="9999, newer"):
            call()


def test_a_database_of_an_older_schema_asks_for_the_upgrade(store, file):
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE prefmw_version SET version_num = '0000'")
    with pytest.raises(SchemaVersionError, match="prefmw db upgrade"):
        reopened(file)


@pytest.mark.parametrize("url", ["sqlite:////proc/nowhere/p.db", "sqlite:////dev/null/p.db"])
def test_a_place_where_no_file_can_be_is_told(url):
    with pytest.raises((UsageError, StoreError), match="cannot be"):
        SQLPreferenceStore(url)


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        SQLPreferenceStore(f"sqlite:///{tmp_path}")


def test_a_schema_that_no_migration_knows_is_told(store, file):
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE prefmw_version SET version_num = '0000'")
    with pytest.raises(SchemaVersionError, match="not one that this prefmw knows"):
        store._database.upgrade()


def test_a_row_that_somebody_broke_is_told(store):
    store.add_user("alice", actor="test")
    with store._database.writing() as connection:
        connection.exec_driver_sql("UPDATE users SET strengths = '{oops'")
    with pytest.raises(StoreError, match="cannot be read"):
        store.profile("alice")


@pytest.mark.parametrize("url", ["nonsense://x", "mysql+nothing://x", "://"])
def test_an_unknown_kind_of_database_is_told(url):
    with pytest.raises(UsageError, match="postgresql"):
        SQLPreferenceStore(url)
