"""What `fiddlehead.recipe` and `fiddlehead.overrides` are made of: paths, names, types and the YAML form."""
