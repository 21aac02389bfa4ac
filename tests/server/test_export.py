"""Export: all of a snapshot and nothing else, each row once, from any cursor on, whatever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tally
from tally.export_folder import ExportFolderError, FolderExport
from tally.exports import What, export_request
from tally.v1 import feature_service_pb2 as pb

import stores.exports
from features import CATALOG
from stores.redis_store import ledger_key
from tests import slices
from tests.commands import TALLY
from tests.conftest import Stack, loaded
from tests.parity.test_parity import load_all

ROWS = 12_000
CARDS = 60
KINDS: tuple[What, ...] = ("transactions", "labels", "features", "ledgers")
KEYS = {"labels": "transaction_id", "ledgers": "card_id"}
START, END = datetime(2024, 1, 20, tzinfo=UTC), datetime(2024, 2, 20, 12, tzinfo=UTC)
KILLS = slices.of(10, 3)
EVERY = pb.EXPORT_KIND_TRANSACTIONS
NONE_OF_THEM: Any = 7
NAMES = [feature.name for feature in CATALOG]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own: everything is exported, and its server is killed."""
    size = ("--rows", str(ROWS), "--cards", str(CARDS), "--days", "90", "--seed", "71")
    with loaded(tmp_path_factory.mktemp("export"), *size) as stack:
        yield stack


@pytest.fixture
def client(own: Stack) -> Iterator[tally.Client]:
    with tally.Client(own.address) as client:
        yield client


def whole(export: tally.exports.Export) -> pa.Table:
    """All rows of an export that reaches its end."""
    batches = [batch for batch, _ in export]
    table = pa.Table.from_batches(batches, export.schema)
    assert export.row_count == len(table)
    return table


def in_sql(stack: Stack, query: str) -> list[tuple]:
    with closing(stack.offline()) as offline:
        return sorted(offline.sql.execute(query).fetchall())


def rows(table: pa.Table, names: list[str]) -> list[tuple]:
    return sorted(zip(*(table[name].to_pylist() for name in names), strict=True))


TRANSACTIONS = [
    "card_id", "event_time", "transaction_id", "amount_minor", "merchant", "category",
    "merchant_latitude", "merchant_longitude",
]  # fmt: skip
LABELS = ["transaction_id", "is_fraud", "label_time"]


def test_transactions_and_labels_are_those_of_postgres(own, client):
    got = whole(client.export("transactions"))
    assert rows(got, TRANSACTIONS) == in_sql(
        own, f"SELECT {', '.join(TRANSACTIONS)} FROM transactions"
    )
    assert len(got) == ROWS
    labels = whole(client.export("labels"))
    assert rows(labels, LABELS) == in_sql(own, f"SELECT {', '.join(LABELS)} FROM labels")


def test_features_are_those_of_a_historical_call(client):
    got = whole(client.export("features"))
    want = client.historical(tally.TimeRange())
    for name in ("card_id", "event_time", "transaction_id", "statuses", "known"):
        assert got[name].to_pylist() == want[name].to_pylist(), name
    assert got.select(NAMES).combine_chunks().cast(got.select(NAMES).schema).equals(
        want.select(NAMES).combine_chunks(), check_metadata=False
    ) or _same_bits(got, want)


def _same_bits(got: pa.Table, want: pa.Table) -> bool:
    return all(got[name].to_numpy().tobytes() == want[name].to_numpy().tobytes() for name in NAMES)


def test_ledgers_are_the_bytes_that_redis_holds(own, client):
    got = whole(client.export("ledgers"))
    cards = got["card_id"].to_pylist()
    assert cards == sorted(cards)
    assert len(cards) > CARDS / 2
    with closing(own.online()) as online:
        assert got["ledger"].to_pylist() == online.read([ledger_key(card) for card in cards])


@pytest.mark.parametrize("what", KINDS)
def test_filters_choose_rows(own, client, what):
    everything = whole(client.export("transactions"))
    cards = sorted(set(everything["card_id"].to_pylist()))
    some = [*cards[3:20:4], b"nobody's card id"]
    within = tally.TimeRange(START, END)
    for chosen in ((), some):
        for event_time in (None, within):
            kept = [
                (transaction, card)
                for transaction, card, at in zip(
                    *(
                        everything[n].to_pylist()
                        for n in ("transaction_id", "card_id", "event_time")
                    ),
                    strict=True,
                )
                if (not chosen or card in chosen) and (event_time is None or START <= at < END)
            ]
            got = whole(
                client.export(what, event_time=event_time, card_ids=chosen, zstd=bool(chosen))
            )
            if what == "ledgers":
                assert got["card_id"].to_pylist() == sorted({card for _, card in kept})
            elif what == "labels":
                labelled = {t for (t,) in in_sql(own, "SELECT transaction_id FROM labels")}
                assert set(got["transaction_id"].to_pylist()) == {t for t, _ in kept} & labelled
            else:
                found = list(
                    zip(got["transaction_id"].to_pylist(), got["card_id"].to_pylist(), strict=True)
                )
                assert sorted(found) == sorted(kept)


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("some_cards", [False, True])
def test_any_cursor_leads_on_to_the_rest(own, client, what, some_cards, monkeypatch):
    cards = [card for (card,) in in_sql(own, "SELECT DISTINCT card_id FROM transactions")]
    chosen = cards[::2] if some_cards else ()
    size = 7 if what == "ledgers" else 700
    export = client.export(what, card_ids=chosen, batch_rows=size)
    parts = list(export)
    names = [name for name in export.schema.names if name not in NAMES]
    table = pa.Table.from_batches([batch for batch, _ in parts], export.schema).select(names)
    assert len(parts) > 2
    done = 0
    for batch, cursor in parts:
        done += len(batch)
        rest = client.resume_export(cursor)
        assert rest.snapshot == export.snapshot
        behind = pa.Table.from_batches([b for b, _ in rest], rest.schema).select(names)
        assert behind.to_pylist() == table.slice(done).to_pylist()
        assert rest.row_count == export.row_count


def test_a_piece_that_is_read_by_several_queries_has_each_row_once(own, monkeypatch):
    monkeypatch.setattr(stores.exports, "BLOCKS_TOGETHER", 3)
    monkeypatch.setattr(stores.exports, "CARDS_TOGETHER", 7)
    monkeypatch.setattr("stores.history.RECORDS_TOGETHER", 900)
    cards = tuple(card for (card,) in in_sql(own, "SELECT DISTINCT card_id FROM transactions"))
    with stores.exports.Exports(own.settings.store_urls()[1]) as exports:
        for kind in stores.exports.Kind:
            for chosen in ((), cards):
                export = exports.begin(kind, (None, None), chosen, b"", -1)
                found = list(exports.read(export, stores.exports.Position(), 211))
                key = KEYS.get(kind, "transaction_id")
                ids = [value for batch, _ in found for value in batch[key].to_pylist()]
                assert len(ids) == len(set(ids)) == found[-1][1].rows
                assert len(ids) == (len(cards) if kind == "ledgers" else ROWS) or kind == "labels"
                _, middle = found[len(found) // 2]
                rest = [
                    value
                    for batch, _ in exports.read(export, middle, 500)
                    for value in batch[key].to_pylist()
                ]
                assert rest == ids[middle.rows :]


def test_what_arrives_meanwhile_does_not_appear(own, client, tmp_path):
    before = {what: whole(client.export(what)) for what in KINDS}
    begun = {what: next(iter(client.export(what, batch_rows=5))) for what in KINDS}
    path = tmp_path / "late.csv"
    size = ("--rows", "500", "--cards", "20", "--days", "90", "--seed", "72")
    assert own.tally("synth", "-o", path, *size).returncode == 0
    load_all(own, [path])
    for what, (first, cursor) in begun.items():
        key = KEYS.get(what, "transaction_id")
        got = first[key].to_pylist() + whole_behind(client, cursor)[key].to_pylist()
        assert got == before[what][key].to_pylist(), what
        assert len(whole(client.export(what))) > len(got)


def whole_behind(client: tally.Client, cursor: bytes) -> pa.Table:
    export = client.resume_export(cursor)
    return pa.Table.from_batches([batch for batch, _ in export], export.schema)


def test_cursors_that_are_none_or_no_more_are_refused(own, client):
    export = client.export("transactions", batch_rows=100)
    _, cursor = next(iter(export))
    for wrong in (
        b"x",
        cursor[:-1],
        cursor[:-1] + bytes([cursor[-1] ^ 1]),
        cursor + b"x",
        b"x" * 5000,
    ):
        with pytest.raises(tally.InvalidRequestError):
            client.resume_export(wrong)
    with closing(own.offline()) as offline:
        offline.sql.execute("UPDATE exports SET expires_at = now() - interval '1 second'")
    with pytest.raises(tally.CursorExpiredError) as caught:
        client.resume_export(cursor)
    assert caught.value.metadata == {"snapshot": export.snapshot}
    assert "begin a new export" in str(caught.value)


def test_an_export_ends_when_rows_of_it_are_taken_away(own, client):
    export = client.export("transactions", batch_rows=1)
    found = iter(export)
    next(found)
    with closing(own.offline()) as offline:
        offline.sql.execute("DELETE FROM exports")
    with pytest.raises(tally.CursorExpiredError):
        list(found)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ExportRequest(), "begin"),
        (pb.ExportRequest(spec=pb.ExportSpec()), "spec.kind"),
        (pb.ExportRequest(spec=pb.ExportSpec(kind=EVERY, batch_rows=0)), "spec.batch_rows"),
        (pb.ExportRequest(spec=pb.ExportSpec(kind=EVERY, batch_rows=65_537)), "spec.batch_rows"),
        (pb.ExportRequest(spec=pb.ExportSpec(kind=EVERY, card_ids=[b"x"])), "spec.card_ids[0]"),
        (
            pb.ExportRequest(spec=pb.ExportSpec(kind=EVERY, compression=NONE_OF_THEM)),
            "spec.compression",
        ),
        (
            pb.ExportRequest(
                spec=pb.ExportSpec(
                    kind=EVERY,
                    event_time=tally.TimeRange(END, START).to_message(),
                )
            ),
            "spec.event_time.end_time",
        ),
        (pb.ExportRequest(cursor=b""), "cursor"),
    ],
)
def test_requests_that_break_the_contract_are_refused(client, request_, field):
    with pytest.raises(tally.InvalidRequestError) as caught:
        client.export_from(request_)
    assert caught.value.violations[0].field == field


# --- folders ------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_folder(folder: Path) -> pa.Table:
    """The rows of a folder that is complete."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [part["file"] for part in manifest["parts"]]
    assert files(folder) == sorted(["manifest.json", *names])
    for part in manifest["parts"]:
        content = (folder / part["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == part["sha256"]
    table = pa.concat_tables([pq.read_table(folder / name) for name in names])
    assert len(table) == manifest["rows"]
    return table


def test_the_command_writes_a_folder(own, client, tmp_path):
    folder = tmp_path / "out"
    size = ("--part-rows", "5000", "--batch-rows", "1000")
    made = own.tally("export", "-o", folder, "--what", "features", *size, "--json")
    assert made.returncode == 0, made.stderr
    manifest = json.loads(made.stdout)
    assert manifest["catalog_fingerprint"] == client.catalog().fingerprint
    assert len(manifest["parts"]) > 1
    table = check_folder(folder)
    assert table["transaction_id"].to_pylist() == (
        whole(client.export("features"))["transaction_id"].to_pylist()
    )
    again = own.tally("export", "-o", folder)
    assert again.returncode == 1
    assert "complete export" in again.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "other files" in own.tally("export", "-o", tmp_path / "mine").stderr
    assert own.tally("export", "-o", folder, "--card-id", "zz").returncode == 2


def test_an_export_of_nothing_is_a_file_without_rows(client, tmp_path):
    request = export_request("labels", tally.TimeRange(0, 1))
    FolderExport(client, tmp_path / "none", request, "labels").run()
    assert len(check_folder(tmp_path / "none")) == 0


def test_a_folder_is_gone_on_with_only_by_the_same_export(client, tmp_path):
    request = export_request("transactions", batch_rows=500)

    def stop(rows: int) -> None:
        if rows > 6_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FolderExport(client, tmp_path, request, "transactions", part_rows=2_000, report=stop).run()
    assert files(tmp_path)[:3] == ["export.json", "part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(ExportFolderError, match="--resume"):
        FolderExport(client, tmp_path, request, "transactions")
    with pytest.raises(ExportFolderError, match="something else"):
        FolderExport(client, tmp_path, export_request("labels"), "labels", resume=True)
    state = (tmp_path / "export.json").read_text()
    (tmp_path / "export.json").write_text(state[:40])
    with pytest.raises(ExportFolderError, match="damaged"):
        FolderExport(client, tmp_path, request, "transactions", resume=True)
    (tmp_path / "export.json").write_text(state)
    FolderExport(client, tmp_path, request, "transactions", resume=True).run()
    ids = check_folder(tmp_path)["transaction_id"].to_pylist()
    assert len(ids) == len(set(ids)) >= ROWS


def wait_for(client: tally.Client) -> None:
    """Waits until a server that was killed is there again."""
    deadline = time.monotonic() + 20
    while True:
        try:
            client.status()
        except tally.UnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


@pytest.mark.sliced
@pytest.mark.parametrize("seed", slices.some("export kills", 10, KILLS))
def test_the_server_is_killed_and_nothing_is_lost_or_twice(own, client, tmp_path, seed):
    rng = slices.drawn(f"export {seed}")
    what = KINDS[seed % 3]
    wait_for(client)
    want = whole(client.export(what))["transaction_id"].to_pylist()
    request = export_request(what, batch_rows=rng.choice([50, 300]))
    kill_at = sorted(rng.randrange(1, len(want)) for _ in range(2))

    def kill(rows: int) -> None:
        if kill_at and rows >= kill_at[0]:
            kill_at.pop(0)
            os.kill(client.status().worker_pid, signal.SIGKILL)

    FolderExport(
        client, tmp_path / "out", request, what, part_rows=rng.choice([400, 5_000]), report=kill
    ).run()
    assert check_folder(tmp_path / "out")["transaction_id"].to_pylist() == want
    assert kill_at == []


@pytest.mark.sliced
@pytest.mark.budget(slices.of(45, 20), "a command is started and killed KILLS times")
def test_the_client_is_killed_and_nothing_is_lost_or_twice(own, client, tmp_path):
    rng = slices.drawn("export client")
    wait_for(client)
    want = whole(client.export("transactions"))["transaction_id"].to_pylist()
    folder = tmp_path / "out"
    command = [
        *(TALLY, "export", "-o", folder, "--resume", "--part-rows", "1"),
        *("--data", own.data, "--batch-rows", "97"),
    ]
    killed = 0
    while not (folder / "manifest.json").exists():
        before = len(list(folder.glob("part-*"))) if folder.exists() else 0
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
        until = before + rng.randrange(12)
        while process.poll() is None:
            if folder.exists() and len(list(folder.glob("part-*"))) >= until and killed < KILLS:
                time.sleep(rng.random() * 0.02)
                process.kill()
                killed += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    assert check_folder(folder)["transaction_id"].to_pylist() == want
    assert killed == KILLS


def test_a_folder_is_written_by_one_at_a_time(client, tmp_path):
    folder = tmp_path / "out"
    request = export_request("labels", batch_rows=500)
    first = FolderExport(client, folder, request, "labels", part_rows=2_000)
    with pytest.raises(ExportFolderError, match="somebody else"):
        FolderExport(client, folder, request, "labels", resume=True)
    first._release()  # as if it were killed
    with pytest.raises(ExportFolderError, match="--resume"):
        FolderExport(client, folder, request, "labels")
    # How it is sent is no part of what it is.
    other = export_request("labels", batch_rows=700, zstd=True)
    FolderExport(client, folder, other, "labels", resume=True).run()
    assert len(check_folder(folder)) > 0
    with pytest.raises(ExportFolderError, match="complete"):
        FolderExport(client, folder, request, "labels", resume=True)


class FixedWindow(tally.ClientConfig):
    """Takes 64 KiB unread and no more: by default gRPC lets a fast sender go far ahead."""

    def channel_options(self) -> list[tuple[str, int | str]]:
        """With a connection of its own, since others may have widened a shared one."""
        return [
            *super().channel_options(),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1 << 16),
            ("grpc.use_local_subchannel_pool", 1),
        ]


def test_more_bulk_calls_than_are_served_at_once_are_told_so_and_all_end(own):
    """None of them is read at first: those that are served must not keep each other waiting."""
    with tally.Client(own.address, FixedWindow()) as client:
        wait_for(client)
        calls = [iter(client.export("transactions", batch_rows=100)) for _ in range(4)]
        for call in calls:
            next(call)
        with pytest.raises(tally.OverloadedError) as caught:
            client.export("labels")
        assert caught.value.metadata == {"limit_calls": "4"}
        assert caught.value.retry_after_ms == 1_000
        assert client.online([tally.Row(card="4000111122223333")]).known.tolist() == [False]
        rows = [sum(len(batch) for batch, _ in call) for call in calls]
        assert len(set(rows)) == 1
        assert len(whole(client.export("labels"))) > 0


AT_ONCE = tally.ClientConfig(retry=tally.RetryConfig(max_attempts=1))
FREE_WITHIN_S = 30.0


def gone_on_with(client: tally.Client, cursor: bytes) -> int:
    """The rows behind a cursor, in as many calls as they take; each of them brings some."""
    rows = 0
    while True:
        begun = cursor
        try:
            for batch, cursor in client.resume_export(begun):  # noqa: B007 (it is gone on with)
                rows += len(batch)
        except tally.DeadlineError:
            assert cursor != begun
        else:
            return rows


def test_a_call_that_takes_too_long_is_ended_and_gone_on_with(tmp_path):
    """Whether its caller reads slowly or not at all: its place is free again."""
    n = 30_000
    with (
        loaded(tmp_path, "--rows", str(n), TALLY_BULK_DEADLINE_S="2") as stack,
        # By itself gRPC takes so much ahead of a slow reader that an export may end in time.
        tally.Client(stack.address, FixedWindow()) as client,
    ):
        taken = []

        def take_slowly() -> None:
            for batch, cursor in client.export("features", batch_rows=1_000):
                taken.append((len(batch), cursor))
                time.sleep(0.5)

        with pytest.raises(tally.DeadlineError, match="2 s"):
            take_slowly()
        rows, cursor = sum(size for size, _ in taken), taken[-1][1]
        assert 0 < rows < n
        assert rows + gone_on_with(client, cursor) == n
        idle = [client.export("features", batch_rows=1_000) for _ in range(4)]
        with tally.Client(stack.address, AT_ONCE) as another:
            begin = time.monotonic()
            while True:
                try:
                    first, cursor = next(iter(another.export("labels")))
                    break
                except tally.OverloadedError:
                    assert time.monotonic() - begin < FREE_WITHIN_S
                    time.sleep(0.1)
            assert len(first) + gone_on_with(another, cursor) == n
        del idle
