"""Benchmarks for developers: measurements against a baseline, beside `qat bench`, which users have.

``train`` compares the speed of training with ``plain``, ``native`` that of operators, ``quantizers`` the
accuracy of choices in a recipe, ``sharding`` the memory of several processes. ``behaviour`` records what the
product computes, to compare two commits.
"""
