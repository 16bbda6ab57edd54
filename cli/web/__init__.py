"""The page of `uniter-app`: a small server of its own, on this machine, of three files and a few JSON answers."""
