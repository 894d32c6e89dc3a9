"""The version of fastserve, in a module of its own so that the build can read it without importing the rest."""

__version__ = "0.1.0"
