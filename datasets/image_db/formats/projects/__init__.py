"""The layouts of other projects' code, in and out: one file a family, the rows in `rows`, what they share in `layout`."""
