"""The down-stream tasks over a made-up world, a file for each of the authors' formats; `table.py` has them all."""
