"""Measurements: every figure in the README and the docs is printed by something here."""
