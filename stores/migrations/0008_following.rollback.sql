ALTER TABLE batch_runs DROP COLUMN is_following;
