"""Masks for models that hold none: groups of axes found in a program, and masks put into it."""
