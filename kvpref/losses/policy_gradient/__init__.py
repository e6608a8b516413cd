"""Policy gradients from given rewards."""
