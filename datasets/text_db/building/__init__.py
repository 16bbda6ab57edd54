"""From a stream of captions to a text database."""
