"""Pages to look at: regions on photographs, runs, charts."""
