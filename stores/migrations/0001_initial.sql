-- depends:

-- Which card key this database was written under.
CREATE TABLE installation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    card_key_fingerprint text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Every transaction id that was ever accepted. A partitioned table cannot hold an id unique across
-- its partitions; this one does, so that an id with another time or card is found out.
CREATE TABLE transaction_ids (
    transaction_id text COLLATE "C" PRIMARY KEY,
    event_time timestamptz NOT NULL
);

-- Amounts are minor units; positions are degrees, to the micro-degree.
CREATE TABLE transactions (
    card_id bytea NOT NULL,
    event_time timestamptz NOT NULL,
    transaction_id text COLLATE "C" NOT NULL,
    amount_minor bigint NOT NULL,
    merchant text NOT NULL,
    category text,
    merchant_latitude double precision,
    merchant_longitude double precision,
    ingested_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (card_id, event_time, transaction_id)
) PARTITION BY RANGE (event_time);

CREATE TABLE labels (
    transaction_id text COLLATE "C" PRIMARY KEY,
    is_fraud boolean NOT NULL,
    label_time timestamptz NOT NULL
);

-- One row for each different content of a card's profile, from the earliest instant it was seen at.
CREATE TABLE profiles (
    card_id bytea NOT NULL,
    content bytea NOT NULL,
    valid_from timestamptz NOT NULL,
    gender text,
    birth_date date,
    job text,
    home_latitude double precision,
    home_longitude double precision,
    city text,
    state text,
    zip text,
    city_pop integer,
    PRIMARY KEY (card_id, content)
);

-- One row for each transaction: its features in the order of the catalogue of that fingerprint.
CREATE TABLE features (
    event_time timestamptz NOT NULL,
    transaction_id text COLLATE "C" NOT NULL,
    catalog_fingerprint text NOT NULL,
    feature_values double precision[] NOT NULL,
    computed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (event_time, transaction_id)
) PARTITION BY RANGE (event_time);

CREATE TABLE loads (
    load_id text PRIMARY KEY,
    description text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    newest_event_time timestamptz,
    rows_read bigint,
    rows_loaded bigint,
    rows_duplicate bigint,
    rows_rejected bigint
);
