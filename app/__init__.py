"""The service: classify images over HTTP with the variants of a model store."""
