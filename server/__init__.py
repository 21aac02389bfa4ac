"""The gRPC server: a thin shell around the core, over Redis and Postgres."""
