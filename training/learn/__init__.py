"""Training: recipes, the loop that runs them, and checkpoints that resume."""
