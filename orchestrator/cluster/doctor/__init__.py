"""What is known of the machines, and what is wrong with them."""
