"""The networks, and what they cost in parameters and operations."""
