ALTER TABLE installation DROP COLUMN history_from;
DROP TABLE dropped;
