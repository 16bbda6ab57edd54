"""Other people's feature files, in and out: one file a family, the rows in `table`."""
