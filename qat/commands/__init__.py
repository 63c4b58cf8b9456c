"""What the commands do, without the command line: find the model and its data, and call the packages below.

One module per command or family of commands, named by a noun. They may import everything but :mod:`qat.cli`.
Begin with ``opening`` and ``sources``, which turn a path into a model and its data; then read any command.
"""
