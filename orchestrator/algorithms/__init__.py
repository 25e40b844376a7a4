"""The table of algorithms: one row each, with its loss, its advantage and what it needs."""
