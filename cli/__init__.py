"""The commands: parse, call one function, print one summary."""
