"""Events: what each is, by its name, and the fields of its text."""
