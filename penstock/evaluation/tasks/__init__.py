"""Tasks of Penstock's evaluation (see docs/evaluation.md)."""
