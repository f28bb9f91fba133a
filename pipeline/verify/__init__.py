"""The proof that every stage passed on what it was given: one file a check, and the table that they fill."""
