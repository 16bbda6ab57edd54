"""The words of `uniter-db --help`: describe, check, convert, merge, split, repair."""
