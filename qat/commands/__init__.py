"""What the commands do, without the command line: find the model and its data, and call the packages below.

One module per command or family of commands, named by a noun. Imports everything but :mod:`qat.cli`. Begin
with ``opening`` and ``sources``, which turn a path into a network or a model; then any command's module.
"""
