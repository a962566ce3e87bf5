"""Trainers: thin subclasses of TRL trainers."""
