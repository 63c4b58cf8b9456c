"""What the commands do, without the command line: find the model and its data, call the floors below."""
