"""What is binary in a file: the facts, and the verdict in words."""
