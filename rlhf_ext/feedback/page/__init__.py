"""The labelling page: a small ASGI application over the label store."""
