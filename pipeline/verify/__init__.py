"""The proof that every stage passed on what it was given: one file a check; `chain.CHECKS` lists them."""
