"""What strings trainers together."""
