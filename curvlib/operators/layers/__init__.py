"""What layers get and give in passes, and which of them have factors."""
