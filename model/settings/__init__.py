"""The settings of a run: their names, their files, and how they are gathered."""
