# cython: language_level=3, embedsignature=True
"""Threads of the operating system that are used again, each request with a Python thread state of its own."""
