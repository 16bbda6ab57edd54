"""The only training loop and the only evaluation loop."""
