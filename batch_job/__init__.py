"""Bulk work: files into both stores."""
