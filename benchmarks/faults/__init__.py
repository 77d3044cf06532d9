"""Runs that are killed at random moments, go on, and must have lost and repeated nothing."""
