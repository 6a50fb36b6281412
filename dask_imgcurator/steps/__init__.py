"""One partition in, one partition out; each next to its public function."""
