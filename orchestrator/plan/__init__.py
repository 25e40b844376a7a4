"""Recipe, lengths and hardware to a `Cut`: memory, time, and why."""
