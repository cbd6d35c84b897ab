"""The compact network: what it keeps, running, reporting, saving and exporting it."""
