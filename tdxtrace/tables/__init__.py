"""What a row means: the declaration of every table, the bundles and their store."""
