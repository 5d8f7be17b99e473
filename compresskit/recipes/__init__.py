"""How the committed weights were made: `python -m compresskit.recipes.train all`."""
