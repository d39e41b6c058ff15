"""What runs in a jail: one file for each kind of answer."""
