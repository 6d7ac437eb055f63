"""What a built model holds and does: for people, and for the rest."""
