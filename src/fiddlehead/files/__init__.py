"""Reading and writing files: paths that a user typed, files of unknown origin, writes that are all or nothing."""
