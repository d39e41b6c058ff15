"""Language models: loading, adapters, attention over packed rows, hidden states to log-probs."""
