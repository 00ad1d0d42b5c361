"""Measurements against other tools; nothing here is part of the package. bench/README.md lists the commands."""
