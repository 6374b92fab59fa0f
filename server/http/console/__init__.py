"""The console: a page, and the data that it requests every second."""
