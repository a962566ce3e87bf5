"""Models: roles on one base, adapters, heads, scoring."""
