"""Dataset scripts: one builder per corpus, and the schema they share."""
