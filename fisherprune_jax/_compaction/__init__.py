"""The smaller network: what is kept, running it, reporting on it, exporting it."""
