"""Adapters: the online store (Redis), the offline store (Postgres), and rebuilding one from the other."""
