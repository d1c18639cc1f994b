"""The named runs: each file is a family, each public function returns a `Recipe`."""
