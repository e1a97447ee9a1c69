"""What is in a set of pairs, and what to leave out of it."""
