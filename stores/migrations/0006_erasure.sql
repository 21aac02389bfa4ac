-- depends: 0005_batch

-- Erasures of cards. Nothing in it tells which card or transaction it was: `blind` is an HMAC of an id
-- under a key derived from the card key.
CREATE TABLE erasures (
    receipt_id text PRIMARY KEY,
    -- What happened up to here stays out, whoever brings it again.
    erased_at timestamptz NOT NULL,
    card_blind bytea NOT NULL
);
CREATE INDEX ON erasures (card_blind);

-- The transactions that were erased, whose labels stay out as well.
CREATE TABLE erased_transactions (
    blind bytea PRIMARY KEY,
    receipt_id text NOT NULL REFERENCES erasures
);
