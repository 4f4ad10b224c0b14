"""Serving: an engine, workers, a controller, a web page and a terminal chat; docs/Serving.md draws who talks to whom."""
