"""Planning: recipe, lengths and hardware to a `Cut`, with predicted memory and time, and the reasons."""
