"""Masks for models without masks: finds groups of axes in a program, and inserts masks."""
