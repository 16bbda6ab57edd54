"""A made-up world of coloured shapes in which learning can be seen: everything about its pictures is known."""
