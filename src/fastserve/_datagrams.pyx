# cython: language_level=3, embedsignature=True
"""The C twin of the datagrams. Its contract and its types are those of ``_datagrams_py``."""
