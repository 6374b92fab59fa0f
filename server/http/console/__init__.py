"""The console: a page to look at, and the one question that it asks every second."""
