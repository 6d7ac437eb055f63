"""What `keras-upcycle demo` runs, and what the study shares with it."""
