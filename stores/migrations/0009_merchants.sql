-- depends: 0008_following

-- What a merchant took on each day of a month, and when frauds among it became known: see
-- features/merchants.py. Each day is day, known_day and count (int4) and amount in minor units (int8).
-- Rows are never changed (see 0004_snapshots.sql): of a month the newest counts.
CREATE TABLE merchant_facts (
    -- As records have it; of all merchants together, empty.
    merchant_key bytea NOT NULL,
    month date NOT NULL,
    days bytea NOT NULL,
    ingested_xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (merchant_key, month, ingested_xid)
);

-- How far they were computed, and what has become of it since: the newest row counts.
CREATE TABLE fact_runs (
    fact_run_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The last day whose features are valid; null where none is.
    through_day date,
    -- What was seen of transactions and labels; null where all is to be computed anew.
    snapshot pg_snapshot,
    -- From this instant on features of transactions may have changed.
    affected_from timestamptz,
    computed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ingested_xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
