"""How a region database comes to be: units, their files, and the side files."""
