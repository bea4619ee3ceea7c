"""Sheets, GIFs, volumes: how results become pictures and files."""
