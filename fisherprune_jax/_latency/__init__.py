"""Costs as times, measured on this machine."""
