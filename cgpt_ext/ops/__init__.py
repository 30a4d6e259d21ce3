"""One file an op: the public function, its reference in plain torch, its registration with torch, its autograd."""
