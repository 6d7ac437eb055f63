"""Ways out: to models and files that need nothing of this package."""
