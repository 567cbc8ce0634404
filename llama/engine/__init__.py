"""The one scheduler: sequences come, are prefilled and decoded together, and leave as they end."""
