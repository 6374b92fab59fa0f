"""Runs code written by strangers in a child process with limits of time and memory."""
