"""Profiling layer of Penstock (see docs/architecture.md)."""
