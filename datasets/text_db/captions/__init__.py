"""Sources of captions: one file a source, the rows in `table`."""
