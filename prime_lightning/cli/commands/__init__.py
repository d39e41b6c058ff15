"""Commands that are not of LightningCLI, one a file."""
