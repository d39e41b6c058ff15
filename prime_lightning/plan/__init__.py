"""`prime-lightning plan`: will a run fit, how long does an iteration take, what does it cost; no GPU, no weights."""
