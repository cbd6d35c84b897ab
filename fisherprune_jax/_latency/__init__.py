"""Costs that are times, measured on the machine at hand."""
