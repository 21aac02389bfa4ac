-- depends: 0006_erasure

-- Of each card, the newest transaction that retention has taken away: a window that begins behind it is
-- exact, any other is flagged.
CREATE TABLE dropped (
    card_id bytea PRIMARY KEY,
    event_time timestamptz NOT NULL
);
-- Everything before was taken away. What is brought again of it stays out.
ALTER TABLE installation ADD COLUMN history_from timestamptz;
