"""What builds and checks the documentation; nothing here is installed."""
