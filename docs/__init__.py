"""Documents, and the code that makes some of them."""
