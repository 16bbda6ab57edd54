"""One extraction run: options, store, units, shares, summary."""
