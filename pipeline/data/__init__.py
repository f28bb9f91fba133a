"""The user's rows: read from files of every shape, checked as a whole, and asked as questions."""
