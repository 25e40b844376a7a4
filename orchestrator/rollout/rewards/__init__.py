"""What a completion is worth: reward functions, endpoints, reward models, and how they add up."""
