"""The worker models: who runs the handler. One mix-in each, to be named before the server."""
