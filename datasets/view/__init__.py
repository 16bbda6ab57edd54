"""Pages to look at: regions on photographs, runs, charts. Templates (`*.html`) hold the markup; nothing from outside, no script."""
