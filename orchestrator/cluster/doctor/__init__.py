"""Facts about the machines of a cluster, and what is wrong with them."""
