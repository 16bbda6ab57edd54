"""Other people's feature files, read and written."""
