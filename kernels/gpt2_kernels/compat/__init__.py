"""The operators under other packages' names and signatures."""
