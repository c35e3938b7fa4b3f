"""Doors into code that others wrote; each host is optional."""
