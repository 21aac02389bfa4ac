"""What processes say of themselves, shared by all; imports nothing of ours."""
