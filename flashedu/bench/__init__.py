"""Speed and resources: measured on a card, or compiled for one, and recorded."""
