DROP TABLE batch_parts;
DROP TABLE batch_runs;
