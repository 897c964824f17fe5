"""One file per architecture family. `MODELS` says which file runs which architecture."""
