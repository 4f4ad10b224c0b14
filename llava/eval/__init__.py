"""Evaluation: answering from the command line, and measuring what granularity buys."""
