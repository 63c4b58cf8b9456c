"""The integer network: its description, its interpreter, its file."""
