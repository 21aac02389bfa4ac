ALTER TABLE installation DROP COLUMN record_format;
ALTER TABLE transactions DROP COLUMN record;
