"""Doors in: what a person has becomes a Flow."""
