"""Measuring servers: ``fastserve bench`` for a handler of one's own, and what the project's benchmarks share.

The figure is CPU time of the server for each request. It holds still where rates drift with the machine, and the
servers that are compared take turns in short rounds, so that what drift there is meets all of them.
"""
