"""What is minimised, one file each: pure functions of a batch."""
