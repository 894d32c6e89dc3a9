# cython: language_level=3, embedsignature=True
"""The C twin of the streams. Its contract and its types are those of ``_streams_py``."""
