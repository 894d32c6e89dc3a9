"""The Python twin of the streams: the same names as ``_streams``, and the source of their types."""
