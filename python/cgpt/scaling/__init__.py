"""What training costs and what it buys: plain arithmetic, no torch."""
