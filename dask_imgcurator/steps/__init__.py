"""One partition in, one partition out; each with its public function beside it."""
