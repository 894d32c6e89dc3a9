"""The Python twin of the datagrams: the same names as ``_datagrams``, and the source of their types."""
