"""The machine around a run: files, processes, memory."""
