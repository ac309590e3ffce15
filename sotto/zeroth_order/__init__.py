"""Training from forward passes alone: probe the loss along public directions, release clipped, noised numbers."""
