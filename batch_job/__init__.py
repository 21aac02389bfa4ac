"""Bulk work: files into both stores, exact features on two engines, verification, erasure."""
