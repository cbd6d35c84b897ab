"""The engine: a traced program, which entries of its arrays can matter, what it costs, how it runs without the rest."""
