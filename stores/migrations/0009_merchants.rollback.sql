DROP TABLE fact_runs;
DROP TABLE merchant_facts;
