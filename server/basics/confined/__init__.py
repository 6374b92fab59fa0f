"""Runs code that strangers wrote in a child process with limits of time and memory."""
