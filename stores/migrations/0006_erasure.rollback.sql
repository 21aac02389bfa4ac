DROP TABLE erased_transactions;
DROP TABLE erasures;
