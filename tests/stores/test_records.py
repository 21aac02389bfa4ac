"""The records that Postgres keeps beside transactions."""

from __future__ import annotations

import pyarrow as pa

from stores.arrow import TRANSACTIONS, records_of, to_records, with_records
from stores.prepare import opened_stores
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id

COLUMNS = ", ".join([*TRANSACTIONS.names, "record"])


def test_records_of_another_format_are_computed_anew_at_the_next_start(stack, tmp_path):
    load(stack, write(tmp_path / "a.csv", [row(cc_num=new_card(), trans_num=new_id())]))
    offline = stack.offline()
    before = dict(offline.sql.execute("SELECT transaction_id, record FROM transactions").fetchall())
    offline.sql.execute("UPDATE transactions SET record = NULL")
    offline.sql.execute("UPDATE installation SET record_format = 'of another version'")
    assert not offline.has_current_records
    said: list[str] = []
    redis_url, postgres_url = stack.settings.store_urls()
    with opened_stores(redis_url, postgres_url, stack.card_key.fingerprint, said.append):
        pass
    assert any("another format" in line for line in said)
    assert offline.has_current_records
    after = dict(offline.sql.execute("SELECT transaction_id, record FROM transactions").fetchall())
    assert after == before
    assert len(after) > 0
    offline.close()


def test_records_come_back_from_any_slice_of_a_column(stack, tmp_path):
    rows = [row(cc_num=new_card(), trans_num=new_id()) for _ in range(20)]
    load(stack, write(tmp_path / "a.csv", rows))
    offline = stack.offline()
    table = pa.Table.from_batches(
        list(offline.read(f"SELECT {COLUMNS} FROM transactions LIMIT 20"))
    )
    offline.close()
    table = with_records(table.drop_columns("record").cast(TRANSACTIONS))
    records = to_records(table)
    n = len(table)
    chunked = pa.chunked_array(
        [table["record"].combine_chunks()[: n // 2], *table["record"][n // 2 :].chunks]
    )
    for column, want in (
        (table["record"], records),
        (table["record"][3:7], records[3:7]),
        (chunked, records),
        (table["record"][:0], records[:0]),
    ):
        assert records_of(column).tobytes() == want.tobytes()
