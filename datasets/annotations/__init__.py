"""Raw annotations of the down-stream tasks to Iterator[Example]."""
