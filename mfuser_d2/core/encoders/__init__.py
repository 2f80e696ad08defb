"""Frozen encoders behind one contract: vision towers, text towers, and how they are built by name."""
