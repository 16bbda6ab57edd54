"""From records to a packed batch: corpus, examples, order, plans, collation, loading."""
