"""The engine: finds which entries of a traced program can matter, counts costs, and runs it without the rest."""
