"""Preference and prompt data: row schemas, validation, collators."""
