-- depends: 0003_records

-- Which transaction of Postgres wrote a row. Rows are never changed, so that what a snapshot saw can be
-- told at any later time, by any connection: an export goes on after the server, or Postgres, was killed.
ALTER TABLE transactions ADD COLUMN ingested_xid xid8 NOT NULL DEFAULT pg_current_xact_id();
ALTER TABLE labels ADD COLUMN ingested_xid xid8 NOT NULL DEFAULT pg_current_xact_id();

-- A content that turns out to have held from an earlier instant gets another row.
ALTER TABLE profiles DROP CONSTRAINT profiles_pkey;
ALTER TABLE profiles ADD COLUMN ingested_xid xid8 NOT NULL DEFAULT pg_current_xact_id();
ALTER TABLE profiles ADD PRIMARY KEY (card_id, content, valid_from);

-- Exports that can be gone on with. A row that is gone has expired.
CREATE TABLE exports (
    export_id text PRIMARY KEY,
    -- What is exported: the contract's ExportSpec.
    spec bytea NOT NULL,
    -- pg_current_snapshot() when it began.
    snapshot pg_snapshot NOT NULL,
    -- In which parts, as JSON.
    plan jsonb NOT NULL,
    catalog_fingerprint text NOT NULL,
    complete_through_ms bigint NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);

-- Histories of cards are read from the index alone, where they lie together in order.
ALTER TABLE transactions DROP CONSTRAINT transactions_pkey;
ALTER TABLE transactions ADD PRIMARY KEY (card_id, event_time, transaction_id) INCLUDE (record, ingested_xid);
