-- depends: 0001_initial

-- How far the stream job has come, with each batch: everything before next_offset is in both stores.
CREATE TABLE stream_progress (
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL,
    -- When the last of them was appended to the topic.
    append_time timestamptz NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, partition)
);
