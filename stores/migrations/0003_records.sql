-- depends: 0002_stream

-- What a ledger keeps of a transaction, as bytes: histories are read without being computed anew.
ALTER TABLE transactions ADD COLUMN record bytea;
-- What those bytes mean. Of another format, or of none, they are computed anew at the next start.
ALTER TABLE installation ADD COLUMN record_format text;
