"""What runs inside a jail: standard library only, no import from the rest of the package; `boot.py` starts it bare."""
