-- depends: 0007_retention

-- Whether a run computed all that had come in since the last such run, and not some days that were named.
ALTER TABLE batch_runs ADD COLUMN is_following boolean NOT NULL DEFAULT false;
