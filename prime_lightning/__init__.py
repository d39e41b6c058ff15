"""PRIME (Process Reinforcement through IMplicit rEwards, arXiv 2502.01456) as a PyTorch Lightning package."""

__version__ = "0.1.0"
