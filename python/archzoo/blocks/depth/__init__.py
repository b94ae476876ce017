"""Depth policies, one file each."""
