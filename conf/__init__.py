"""Values only: makes the YAML files installable as package data."""
