"""A run: its folder, its stages and what each was made from, and the running of those that are not up to date."""
