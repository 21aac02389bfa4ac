"""The embedded stack: Postgres, Valkey and the server as child processes of one supervisor."""
