"""Environments that come with the program."""
