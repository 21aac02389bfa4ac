DROP TABLE loads;
DROP TABLE features;
DROP TABLE profiles;
DROP TABLE labels;
DROP TABLE transactions;
DROP TABLE transaction_ids;
DROP TABLE installation;
