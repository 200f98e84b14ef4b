"""Configurations of other systems turned into ours (see docs/migrate/)."""
