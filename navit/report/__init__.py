"""One page that compares runs, from nothing but their run folders."""
