ALTER TABLE transactions DROP CONSTRAINT transactions_pkey;
ALTER TABLE transactions ADD PRIMARY KEY (card_id, event_time, transaction_id);
DROP TABLE exports;
DELETE FROM profiles p USING profiles q
WHERE p.card_id = q.card_id AND p.content = q.content AND p.valid_from > q.valid_from;
ALTER TABLE profiles DROP CONSTRAINT profiles_pkey;
ALTER TABLE profiles DROP COLUMN ingested_xid;
ALTER TABLE profiles ADD PRIMARY KEY (card_id, content);
ALTER TABLE labels DROP COLUMN ingested_xid;
ALTER TABLE transactions DROP COLUMN ingested_xid;
