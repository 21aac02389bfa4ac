-- depends: 0004_snapshots

-- Runs of the batch job: what, over which days, and what came of it.
CREATE TABLE batch_runs (
    run_id text PRIMARY KEY,
    engine text NOT NULL,
    -- Transactions from one instant to before another.
    from_time timestamptz NOT NULL,
    to_time timestamptz NOT NULL,
    -- The parts it is done in: spans of card ids.
    parts integer NOT NULL,
    catalog_fingerprint text NOT NULL,
    -- Of the code that computed: a digest of its sources.
    code_fingerprint text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    rows_computed bigint,
    rows_new bigint,
    rows_repaired bigint,
    seconds double precision
);

-- Parts that are done: a run that was killed goes on with the others.
CREATE TABLE batch_parts (
    run_id text NOT NULL REFERENCES batch_runs ON DELETE CASCADE,
    part integer NOT NULL,
    rows_computed bigint NOT NULL,
    rows_new bigint NOT NULL,
    rows_repaired bigint NOT NULL,
    PRIMARY KEY (run_id, part)
);
